"""Called by torch when it is imported (entry point group ``torch.backends``).

Installed as the top-level module ``_somf_mergekit_autoload``, so that ``import torch`` goes on
working when the package itself is broken, half removed or, in an editable install, gone.
"""

# Why nothing was installed, for `mergekit-somf doctor`.
failure: "Exception | None" = None


def autoload() -> None:
    """Make mergekit know ``somf`` as soon as it is imported; never raise."""
    global failure
    try:
        from somf_mergekit.plugin.autoload import install

        install()
    except Exception as error:  # raised here, it would break torch for everyone
        failure = error
