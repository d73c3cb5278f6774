"""An audit for others: JUnit XML, SARIF, Markdown for a job's summary, and a few lines for a terminal."""

from fedkl.auditing.exports.junit import junit
from fedkl.auditing.exports.sarif import sarif
from fedkl.auditing.exports.summary import summary
from fedkl.auditing.exports.text import text

__all__ = ["junit", "sarif", "summary", "text"]
