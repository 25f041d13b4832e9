//! How do connections come and go? They are taken until the server is to end; then running requests have some time left.

use crate::app::App;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::io;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// Between two looks at what the histograms recorded.
const UPKEEP: Duration = Duration::from_secs(5);

/// That connections have to send what is in their buffers, when all requests are over.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// After an error of the system's, such as too many open files, nothing is accepted for so long.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves until told to stop. The first message of `stops` lets running requests come to their end, as far as they do within the
/// time that the options allow; the second ends at once.
pub async fn serve(listener: TcpListener, app: App, mut stops: mpsc::Receiver<()>) -> io::Result<()> {
    let router = app.router();
    let graceful = GracefulShutdown::new();
    let mut upkeep = tokio::time::interval(UPKEEP);
    let end = end(&app, &mut stops);
    tokio::pin!(end);
    let how = loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => take(stream, &router, &app, &graceful),
                Err(error) => {
                    tracing::warn!("a connection could not be accepted: {error}");
                    tokio::time::sleep(PAUSE).await;
                }
            },
            _ = upkeep.tick() => app.meters().upkeep(),
            how = &mut end => break how,
        }
    };
    drop(listener);
    if how == Ending::Drained {
        tokio::select! {
            () = graceful.shutdown() => {}
            () = tokio::time::sleep(LAST_WORDS) => {}
        }
    }
    Ok(())
}

/// How the end came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// What ran is over, or was told that it is.
    Drained,
    /// At once.
    AtOnce,
}

/// Waits until the server is to end, and for what runs then.
async fn end(app: &App, stops: &mut mpsc::Receiver<()>) -> Ending {
    if stops.recv().await.is_none() {
        // Nobody can say stop any more.
        std::future::pending::<()>().await;
    }
    let limit = app.options().shutdown_timeout;
    tracing::info!("shutting down; running requests have {} s", limit.as_secs_f64());
    tokio::select! {
        () = app.drain() => return Ending::Drained,
        () = tokio::time::sleep(limit) => {}
        _ = stops.recv() => return Ending::AtOnce,
    }
    tracing::warn!("requests that still run are ended");
    let stopped = app.clone();
    let stopping = tokio::task::spawn_blocking(move || {
        if let Some(loaded) = stopped.loaded() {
            loaded.service.stop();
        }
    });
    let heard = async {
        // A panic of the engine's is in the log.
        drop(stopping.await);
        app.drain().await;
    };
    tokio::select! {
        () = heard => Ending::Drained,
        () = tokio::time::sleep(LAST_WORDS) => Ending::Drained,
        _ = stops.recv() => Ending::AtOnce,
    }
}

fn take(stream: TcpStream, router: &Router, app: &App, graceful: &GracefulShutdown) {
    // Without it an event may wait for the one after it.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!("{error}");
    }
    let service = TowerToHyperService::new(router.clone());
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(app.options().read_timeout)
        .serve_connection(TokioIo::new(stream), service);
    let connection = graceful.watch(connection);
    tokio::spawn(async move {
        // Clients go away whenever they like.
        if let Err(error) = connection.await {
            tracing::debug!("a connection ended: {error}");
        }
    });
}
