"""What every module may raise, and how an error is said in one line."""

import importlib.util


class UserError(Exception):
    """Input that cannot be used. The message is the one line that the user sees; a script then exits with status 2."""


def first_line(error: Exception) -> str:
    """What an error says, in one line, whatever library it came from."""
    text = str(error).strip() or type(error).__name__
    if "weights only" in text.lower().replace("_", " "):  # torch goes on with how to load it all the same
        return "not safe to load: a pickle of more than weights, or damaged"
    return text.splitlines()[0]


def require(flag: str, *packages: str) -> None:
    """Check that packages of requirements/extra.txt, which only some flags need, are installed.

    Raises:
        UserError: one is not.
    """
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        names = " and ".join(missing)
        raise UserError(f"{flag}: needs {names}; pip install -r requirements/extra.txt")
