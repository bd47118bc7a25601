"""Rejects masks and condition images, which have the name of an image and a suffix."""

import pyarrow as pa
import pyarrow.compute as pc

# x_mask.png next to x.jpg: OneTrainer writes -masklabel and -condlabel, SimpleTuner and ai-toolkit
# _mask, webdataset samples .mask, .seg and .depth.
MARK = (
    r"(?i)[-_.](?:mask|masks|masklabel|condlabel|conditioning|depth|seg|segmentation|canny"
    r"|openpose|lineart)\.[^./]*$"
)


def with_masks(images: pa.Table) -> pa.Table:
    """The images (IMAGES); one whose name without the mark is another's is rejected as its mask.

    Names are compared up to the first dot as well: `0000.mask.png` is the mask of `0000.image.jpg`,
    as in a webdataset sample.
    """
    key = images["key"].combine_chunks()
    marked = pc.match_substring_regex(key, MARK)
    if not pc.any(marked).as_py():
        return images
    base = pc.replace_substring_regex(key, MARK, "")
    stems = pc.replace_substring_regex(key, r"\.[^./]*$", "")
    shortest = pc.replace_substring_regex(key.filter(pc.invert(marked)), r"\.[^/]*$", "")
    has_image = pc.is_in(base, value_set=pa.concat_arrays([stems, shortest]))
    masks = pc.and_(pc.and_(marked, has_image), pc.equal(images["reason"], ""))
    detail = pc.binary_join_element_wise("by its name, of ", base, "")
    for name, value in (("reason", "mask"), ("detail", detail)):
        column = pc.if_else(masks, value, images[name])
        images = images.set_column(images.schema.get_field_index(name), name, column)
    return images
