"""Models from the Hugging Face hub, with failures told in one line."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from crossbit.errors import InputError
from crossbit.models.quiet import quiet_transformers

HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*$")

# fnmatch's * crosses slashes, so folders below the top (onnx/, original/) are shut out apart.
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer*", "*.model"]
_LICENCES = ["LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "*TERMS*", "COPYING*"]
_UNWANTED = ["*/*", "consolidated*"]
_TIMEOUT = 10.0

_OTHERWISE = "log in with `hf auth login`, or pass a local folder"


def download(name: str, *, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """Download config, weights, tokenizer and licence of the hub model ``name``.

    The hub is asked once about the model before anything is downloaded; when it cannot be reached
    within 10 s, a copy downloaded earlier is used.

    Args:
        name: ``org/name``.
        revision: branch, tag or commit.
        allow_pickle: take pickled weights where there are no safetensors.

    Returns:
        The folder of the snapshot in the hub's own cache.

    Raises:
        InputError: unreachable and not downloaded before, unknown, gated, unknown revision, or
            without safetensors.
    """
    at = f"{name}@{revision}" if revision else name
    try:
        info = HfApi().model_info(name, revision=revision, timeout=_TIMEOUT)
    except GatedRepoError as error:
        raise _gated(at, name) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{at}: the model has no such revision on the hub") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{at}: no such model on the hub, or a private one; check the name, {_OTHERWISE}"
        ) from error
    except HfHubHTTPError as error:
        return _downloaded_before(at, name, revision, error)
    except Exception as error:
        # Every way of not getting through (DNS, proxy, TLS, timeout, offline mode) has its own
        # class, from whichever HTTP library this version of the hub client uses.
        return _downloaded_before(at, name, revision, error)
    files = {s.rfilename for s in info.siblings or [] if "/" not in s.rfilename}
    patterns = [*_WANTED, *_LICENCES]
    if not any(f.endswith(".safetensors") for f in files):
        if not any(f.endswith((".bin", ".pt", ".pth")) for f in files):
            gguf = any(f.endswith(".gguf") for f in files)
            hint = "download one .gguf file and pass its path" if gguf else "pass another model"
            raise InputError(f"{at}: no safetensors in this hub model; {hint}")
        if not allow_pickle:
            raise InputError(
                f"{at}: only pickled weights on the hub, which can run code when read; "
                "pass a safetensors model, or give quantize --allow-pickle if you trust it"
            )
        patterns.append("pytorch_model*.bin")
    try:
        with quiet_transformers():
            path = snapshot_download(
                name,
                revision=info.sha,
                allow_patterns=patterns,
                ignore_patterns=_UNWANTED,
                etag_timeout=_TIMEOUT,
            )
    except GatedRepoError as error:
        raise _gated(at, name) from error
    except Exception as error:
        raise InputError(
            f"{at}: the download failed ({_one_line(error)}); try again, or pass a local folder"
        ) from error
    return Path(path)


def _downloaded_before(at: str, name: str, revision: str | None, error: Exception) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:
        raise InputError(
            f"{at}: the hub cannot be reached ({_one_line(error)}) and no copy was downloaded "
            "before; pass a local folder or demo, or go online (gated models need "
            "`hf auth login`)"
        ) from error


def _gated(at: str, name: str) -> InputError:
    return InputError(
        f"{at}: gated model; accept its terms on https://huggingface.co/{name} and {_OTHERWISE}"
    )


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:120]
