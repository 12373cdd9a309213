"""Human review of pairs: the page, the log of votes, agreement, and the exchange with Label Studio."""

from .agreement import decide, describe_summary, summarize_votes
from .label_studio import LABELING_CONFIG, from_label_studio, to_label_studio
from .server import create_review_app, serve_review
from .votes import ANSWERS, ReviewItem, VoteLog, preferred_side


__all__ = [
    "ANSWERS",
    "LABELING_CONFIG",
    "ReviewItem",
    "VoteLog",
    "create_review_app",
    "decide",
    "describe_summary",
    "from_label_studio",
    "preferred_side",
    "serve_review",
    "summarize_votes",
    "to_label_studio",
]
