"""What every error that a user can mend looks like."""


def assert_one_sentence(message: str, *parts: str) -> None:
    assert "\n" not in message and message.endswith(".") and len(message) < 500, message
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"
