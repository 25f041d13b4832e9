//! The page that shows what the cache does: its files are in the program. What it shows it asks of [`live`](crate::live), and
//! while nobody looks nothing is asked.

use crate::app::App;
use axum::Router;
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::IntoResponse;
use axum::routing::get;

/// A file of the page: where it is, of which type, and what is in it.
struct File {
    path: &'static str,
    kind: &'static str,
    text: &'static str,
}

const FILES: [File; 3] = [
    File { path: "/", kind: "text/html; charset=utf-8", text: include_str!("../page/index.html") },
    File {
        path: "/page/style.css",
        kind: "text/css; charset=utf-8",
        text: include_str!("../page/style.css"),
    },
    File {
        path: "/page/page.js",
        kind: "text/javascript; charset=utf-8",
        text: include_str!("../page/page.js"),
    },
];

/// The page loads nothing from elsewhere, runs no script that is not its own, and is in nobody's frame.
const POLICY: &str =
    "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";

/// Whether something of the page is at this path.
pub fn is_part(path: &str) -> bool {
    FILES.iter().any(|file| file.path == path)
}

/// The files.
pub fn router() -> Router<App> {
    FILES.iter().fold(Router::new(), |router, file| {
        let headers = [
            (header::CONTENT_TYPE, HeaderValue::from_static(file.kind)),
            (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
            (HeaderName::from_static("content-security-policy"), HeaderValue::from_static(POLICY)),
            (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
            (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        ];
        router.route(file.path, get(move || async move { (headers, file.text).into_response() }))
    })
}
