"""The one exception of user mistakes."""


class UserError(Exception):
    """A mistake the user can mend; the message is one line naming the thing, the value and what is accepted."""
