"""The report of an audit as one HTML file: pictures inside, no network, a script that it can do without."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256

from fedkl.auditing import words
from fedkl.report.audit.page import BOUNDS_NOTE, PRESENCE_NOTE, REBUILT, AuditPage
from fedkl.report.figures import thumbnail
from fedkl.report.html import environment, uri

SCRIPT = """
(function () {
  var button = document.getElementById("all"), parts = document.querySelectorAll("details");
  function open(wanted) { parts.forEach(function (part) { part.open = wanted; }); }
  button.hidden = false;
  button.addEventListener("click", function () {
    var wanted = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", wanted);
    open(wanted);
  });
  window.addEventListener("beforeprint", function () { open(true); });
})();
"""
"""Opens all that is folded, on a button and for print."""


def render(page: AuditPage) -> str:
    """The whole page."""
    digest = b64encode(sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        environment()
        .get_template("audit.html.j2")
        .render(
            page=page,
            policy=policy,
            script=SCRIPT,
            source=lambda image: uri(thumbnail(image)),
            bounds_note=BOUNDS_NOTE,
            outcomes=words.OUTCOMES,
            presence_note=PRESENCE_NOTE,
            rebuilt=REBUILT,
        )
    )
