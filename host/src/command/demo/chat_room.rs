//! A chat room on loopback with a secret address, as the services of that kind have.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio_util::task::TaskTracker;

type Messages = Arc<Mutex<Vec<String>>>;

/// Listens until it is dropped.
#[derive(Debug)]
pub(super) struct ChatRoom {
    address: SocketAddr,
    token: String,
    messages: Messages,
    stop: tokio_util::sync::CancellationToken,
}

impl ChatRoom {
    pub(super) async fn open() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let room = Self {
            address: listener.local_addr()?,
            token: uuid::Uuid::new_v4().simple().to_string(),
            messages: Messages::default(),
            stop: tokio_util::sync::CancellationToken::new(),
        };
        let router = Router::new().route(&format!("/rooms/{}", room.token), post(hear)).with_state(Arc::clone(&room.messages));
        let stop = room.stop.clone();
        TaskTracker::new().spawn(async move {
            tokio::select! {
                _ = axum::serve(listener, router) => {}
                () = stop.cancelled() => {}
            }
        });
        Ok(room)
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn secret_url(&self) -> String {
        format!("http://{}/rooms/{}", self.address, self.token)
    }

    pub(super) fn messages(&self) -> Vec<String> {
        self.messages.lock().clone()
    }
}

impl Drop for ChatRoom {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn hear(State(messages): State<Messages>, body: String) -> StatusCode {
    let text =
        serde_json::from_str::<serde_json::Value>(&body).ok().and_then(|value| value.get("text").and_then(|text| text.as_str().map(str::to_owned)));
    messages.lock().push(text.unwrap_or(body));
    StatusCode::OK
}
