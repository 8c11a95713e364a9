"""Who may write to a repository: known before any work, and without making anything."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from della_dist.errors import OutputError
from della_dist.storage.hub.output.requests import LOG_IN
from della_dist.storage.hub.snapshot import constants_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_COMMIT = re.compile("[0-9a-f]{40}")


def check_name(location: str, repository: str, branch: str) -> None:
    """Refuse what no repository or branch can be called, and to write while offline."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if _COMMIT.fullmatch(branch) or branch.startswith("refs/"):
        raise OutputError(
            f"{location} names a commit or a reference, which nobody can write to. Name a branch "
            "behind the @, or leave it out for main."
        )
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise OutputError(f"{location} cannot be made on the Hub: {error}") from None
    if constants_of().HF_HUB_OFFLINE:
        raise OutputError(
            f"{location} cannot be written while HF_HUB_OFFLINE forbids to ask the Hub. Unset "
            "that, or choose a directory."
        )


def who(api: HfApi) -> dict[str, Any]:
    """Return who the token belongs to."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        user = api.whoami()
    except LocalTokenNotFoundError:
        raise OutputError(
            f"writing to the Hub needs a token, and there is none. {LOG_IN}"
        ) from None
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise OutputError(
            f"writing to the Hub needs a token that may write, and this one of {user.get('name')} "
            f"may only read. {LOG_IN}"
        )
    return user


def check_namespace(location: str, repository: str, user: Mapping[str, Any]) -> None:
    """Refuse a repository under a name that is no own one of this user, nor of an organisation."""
    names = [user.get("name"), *(org.get("name") for org in user.get("orgs") or ())]
    if repository.partition("/")[0] not in names:
        raise OutputError(
            f"{location} does not exist, or is closed to this user ({names[0]}), who may make "
            f"repositories under {', '.join(map(str, names))}. Choose such a name, or log in as "
            "somebody else ('hf auth login', HF_TOKEN)."
        )


def check_right(api: HfApi, location: str, repository: str, user: Mapping[str, Any]) -> None:
    """Ask whether this user may write to a repository that is there."""
    check: Any = api.auth_check
    if "write" in inspect.signature(check).parameters:
        check(repository, write=True)
    else:  # an older huggingface_hub asks for the right to read alone
        check_namespace(location, repository, user)
