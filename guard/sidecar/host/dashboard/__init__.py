"""The page for people: what sidecars are and do, in a browser.

`guard serve --dashboard` serves it for the sidecar itself, and `guard top` for any number of sidecars that offer the
admin service. It is one static page with one script; what it shows comes from the admin service's messages as JSON, and
flagged requests as server-sent events.
"""

from guard.sidecar.host.dashboard.access import Access
from guard.sidecar.host.dashboard.serving import serve_dashboard
from guard.sidecar.host.dashboard.sources import Own, Remote, Source

__all__ = ["Access", "Own", "Remote", "Source", "serve_dashboard"]
