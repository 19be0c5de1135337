"""Tasks over other people's texts, read at build time: the tone of a snippet, and whether a mail is spam."""

import email
import email.policy
import html
import re
from collections.abc import Iterator
from pathlib import Path

from experts.classification.sources import SPAM_PACKAGE, VADER_REQUIREMENT, mails, rated_snippets
from experts.classification.task import ClassificationTask, Item
from experts.embedded.skills.skill import split_key

_LEAST_RATING = 0.5
_MAIL_CHARACTERS = 400


def sentiment() -> ClassificationTask:
    """A snippet of a review, tweet or editorial → its tone."""
    return ClassificationTask(
        name="sentiment",
        description="tone of a snippet of a review, tweet or editorial",
        source=f"rated snippets in the sdist of {VADER_REQUIREMENT}",
        licence="third-party texts, read at build time only; ratings MIT",
        labels=("negative", "positive"),
        items=_snippets,
    )


def spam() -> ClassificationTask:
    """The beginning of a mail → ham or spam."""
    return ClassificationTask(
        name="spam",
        description="whether a mail, subject and first lines, is spam",
        source=f"SpamAssassin public corpus (npm {SPAM_PACKAGE})",
        licence="CC0 / PDDL",
        labels=("ham", "spam"),
        items=_mails,
        train_limit=3000,
        steps=100,
        batch=16,
    )


def _snippets(downloads: Path) -> Iterator[Item]:
    for _, rating, raw in rated_snippets(downloads):
        text = " ".join(html.unescape(raw).split())
        if abs(rating) >= _LEAST_RATING and text:
            yield Item(text, "positive" if rating > 0 else "negative", text)


def _mails(downloads: Path) -> Iterator[Item]:
    for folder, raw in mails(downloads):
        text = mail_text(raw)
        if len(text) >= 40:
            # Mass mails differ in names and numbers: what is left without them decides the split.
            key = re.sub(r"[^a-z]+", " ", split_key(text))[:120]
            yield Item(text, "spam" if folder.startswith("spam") else "ham", key)


def mail_text(raw: bytes) -> str:
    """Subject and the beginning of the first readable part, markup and white space removed."""
    message = email.message_from_bytes(raw.partition(b"\n")[2], policy=email.policy.compat32)
    subject = str(message.get("Subject", ""))
    body = ""
    for part in message.walk():
        if part.get_content_type() in ("text/plain", "text/html"):
            payload = part.get_payload(decode=True)
            body = payload.decode("latin-1") if isinstance(payload, bytes) else ""
            break
    body = re.sub(r"(?is)<(script|style).*?</\1>|<[^>]*>", " ", body)
    text = " ".join(html.unescape(f"{subject} {body}").split())
    return text[:_MAIL_CHARACTERS]
