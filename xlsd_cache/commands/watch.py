"""`xlsd-cache watch`: keeps a store up to date with its sources until it is stopped."""

import logging
from contextlib import ExitStack

from filelock import FileLock, Timeout

from xlsd_cache.building.plan import store_identity
from xlsd_cache.console.progress import working
from xlsd_cache.encoding.vae import load_vae, require_vae
from xlsd_cache.errors import UserError
from xlsd_cache.options.watch import WatchOptions
from xlsd_cache.runtime.device import device_of
from xlsd_cache.sources.scan import named_roots
from xlsd_cache.store.identity import is_store
from xlsd_cache.store.manifest import Manifest
from xlsd_cache.watching.status import StatusFile
from xlsd_cache.watching.watcher import Watcher

log = logging.getLogger("xlsd.cache.commands")


def watch(options: WatchOptions) -> None:
    """Build whenever enough has changed in the sources; returns after a stop signal.

    Raises UserError at the start for what no pass could do. Later failures are told, and tried
    again.
    """
    device_of(options.device)  # refuses early
    require_vae(options.vae)
    if not is_store(options.out):  # a source of an existing store may come back
        named_roots(options.source)
    manifest = Manifest(options.out)
    with ExitStack() as stack:
        with working("loading the VAE"):
            vae = load_vae(options.vae, options.vae_scaling_factor, padding=options.vae_padding)
        store_identity(options, vae)
        manifest.make_folders()
        try:
            stack.enter_context(FileLock(manifest.staging / "watch.lock", blocking=False))
        except Timeout:
            raise UserError(
                f"another xlsd-cache watch writes {options.out}; stop it, or give another --out"
            ) from None
        watcher = Watcher(options, vae, StatusFile(options.out))
        if options.http:
            from xlsd_cache.watching.server import serving

            status = watcher.status
            stack.enter_context(
                serving(*options.address, options.out.name, lambda: status.now, options.max_wait_s)
            )
        log.info(f"watching {', '.join(options.source)}; {watcher.status.path} says how it goes")
        watcher.run()
