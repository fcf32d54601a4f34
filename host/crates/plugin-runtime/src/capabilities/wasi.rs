//! WASI 0.2 as a plugin sees it: clocks, random numbers, output to the log. No files, no sockets, no environment.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncWrite;
use wasmdm_service::clock::Clock;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};
use wasmtime_wasi::{HostWallClock, WasiCtx};

use crate::capabilities::log::{CallLog, Stream};
use crate::contract;

/// Bytes of random numbers at once.
const MAX_RANDOM: u64 = 64 << 10;

/// The context of one call.
pub(crate) fn context(log: &Arc<CallLog>, clock: &Arc<dyn Clock>) -> WasiCtx {
    WasiCtx::builder()
        .stdout(Output { log: Arc::clone(log), stream: Stream::Out })
        .stderr(Output { log: Arc::clone(log), stream: Stream::Err })
        .wall_clock(ServerClock(Arc::clone(clock)))
        .max_random_size(MAX_RANDOM)
        .allow_tcp(false)
        .allow_udp(false)
        .allow_ip_name_lookup(false)
        .build()
}

/// The server's clock, so that a guest's time is the one of its call's deadline.
struct ServerClock(Arc<dyn Clock>);

impl HostWallClock for ServerClock {
    fn resolution(&self) -> Duration {
        Duration::from_millis(1)
    }

    fn now(&self) -> Duration {
        Duration::from_millis(contract::timestamp(self.0.now()))
    }
}

/// A stream that ends in the log.
#[derive(Clone)]
struct Output {
    log: Arc<CallLog>,
    stream: Stream,
}

impl IsTerminal for Output {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Output {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(tokio::io::sink())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

impl OutputStream for Output {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.log.print(self.stream, &bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(4 << 10)
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for Output {
    async fn ready(&mut self) {}
}
