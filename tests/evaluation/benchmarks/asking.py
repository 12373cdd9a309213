"""Evidence as a run collects it, from a function that plays the judge."""

from trl_spatial.evaluation.benchmarks.base import Evidence


def ask(question, judge):
    """Replies of `judge(attempt)` until enough are usable or the tries are used up."""
    replies = []
    for attempt in range(question.max_tries):
        replies.append(judge(attempt))
        usable = [reply for reply in replies if reply is not None and question.is_usable(reply)]
        if len(usable) == question.num_replies:
            break
    return replies


def collect(benchmark, items, files, protocol, judge):
    """What `judge(item, number, question, attempt)` says about the files of a folder."""
    images = benchmark.assign(items, sorted(files), protocol)
    replies = {
        (item.id, number, question.key): ask(
            question, lambda attempt, about=(item, number, question): judge(*about, attempt)
        )
        for item in items
        for number in range(benchmark.num_images)
        if (item.id, number) in images
        for question in benchmark.questions(item, protocol)
    }
    return Evidence(images, replies)


def all_files(benchmark, items):
    """A folder in which no image is missing."""
    return [benchmark.image_path(item, number) for item in items for number in range(benchmark.num_images)]


def by_name(metrics):
    """Name → number."""
    return {metric.name: metric.estimate for metric in metrics}
