"""Masks and condition images beside images: found by their names, and not trained in silence."""

import pyarrow as pa
import pyarrow.compute as pc

# x_mask.png beside x.jpg: OneTrainer writes -masklabel and -condlabel, SimpleTuner and ai-toolkit
# _mask, webdataset samples .mask, .seg and .depth.
MARK = (
    r"(?i)[-_.](?:mask|masks|masklabel|condlabel|conditioning|depth|seg|segmentation|canny"
    r"|openpose|lineart)\.[^./]*$"
)


def with_masks(images: pa.Table) -> pa.Table:
    """The images (sources.IMAGES), those rejected as masks whose name without the mark is one's.

    Of `0000.image.jpg` and `0000.mask.png`, a webdataset sample, the second is a mask: up to the
    first dot as well a name is one's.
    """
    key = images["key"].combine_chunks()
    marked = pc.match_substring_regex(key, MARK)
    if not pc.any(marked).as_py():
        return images
    base = pc.replace_substring_regex(key, MARK, "")
    stems = pc.replace_substring_regex(key, r"\.[^./]*$", "")
    shortest = pc.replace_substring_regex(key.filter(pc.invert(marked)), r"\.[^/]*$", "")
    beside = pc.is_in(base, value_set=pa.concat_arrays([stems, shortest]))
    masks = pc.and_(pc.and_(marked, beside), pc.equal(images["reason"], ""))
    told = pc.binary_join_element_wise("by its name, of ", base, "")
    for name, value in (("reason", "mask"), ("detail", told)):
        column = pc.if_else(masks, value, images[name])
        images = images.set_column(images.schema.get_field_index(name), name, column)
    return images
