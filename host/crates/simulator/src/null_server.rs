//! A server that does nothing but answer 200 with an empty body: what the simulator could reach at most, and at what cost of its own.

use std::convert::Infallible;
use std::net::SocketAddr;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::error::SimulatorError;

/// Runs on a thread of its own, so that its CPU time can be told from the simulator's. Dropping it stops it.
#[derive(Debug)]
pub struct NullServer {
    address: SocketAddr,
    thread_id: i32,
    stop: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl NullServer {
    /// Starts one on a free port of the loopback interface.
    pub fn start() -> Result<Self, SimulatorError> {
        let failed = |error| SimulatorError::io("null server", error);
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let (started, starting) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("null-server".into())
            .spawn(move || {
                // Whoever waits for the id may be gone already; then nobody needs it.
                let _ = started.send(thread_id());
                runtime.block_on(serve(listener, stopped));
            })
            .map_err(failed)?;
        let thread_id = starting.recv().map_err(|_| failed(std::io::Error::other("the thread ended at once")))?;
        Ok(Self { address, thread_id, stop, thread: Some(thread) })
    }

    /// Where it listens, as a URL for devices.
    pub fn url(&self) -> String {
        format!("http://{}/mdm", self.address)
    }

    /// The thread that serves, as the operating system numbers it; zero where that is unknown.
    pub const fn thread_id(&self) -> i32 {
        self.thread_id
    }
}

impl Drop for NullServer {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            // It only panics if a bug is in it, and then there is nothing to clean up.
            let _ = thread.join();
        }
    }
}

#[cfg(target_os = "linux")]
fn thread_id() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

#[cfg(not(target_os = "linux"))]
fn thread_id() -> i32 {
    0
}

async fn serve(listener: std::net::TcpListener, stop: CancellationToken) {
    let Ok(listener) = TcpListener::from_std(listener) else {
        return;
    };
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                // Only speed suffers without it.
                let _ = stream.set_nodelay(true);
                connections.spawn(async move {
                    // A connection that breaks is the client's affair.
                    let _ = http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service_fn(answer))
                        .await;
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
    connections.shutdown().await;
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    // The body is read as a server has to; what is wrong with it does not matter here.
    let _ = request.into_body().collect().await;
    Ok(Response::new(Full::new(Bytes::new())))
}
