//! A relay between client and service that can stop relaying without ending the connections.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Connections of an earlier generation than the current one lead nowhere.
pub(crate) struct Relay {
    port: u16,
    generation: Arc<AtomicU64>,
}

impl Relay {
    pub(crate) fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let generation = Arc::new(AtomicU64::new(0));
        let current = Arc::clone(&generation);
        std::thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                let service = TcpStream::connect(target).unwrap();
                client.set_nodelay(true).unwrap();
                service.set_nodelay(true).unwrap();
                let born = current.load(Ordering::SeqCst);
                for (from, to) in [(client.try_clone().unwrap(), service.try_clone().unwrap()), (service, client)] {
                    let current = Arc::clone(&current);
                    std::thread::spawn(move || pass(from, to, || current.load(Ordering::SeqCst) == born));
                }
            }
        });
        Self { port, generation }
    }

    pub(crate) const fn port(&self) -> u16 {
        self.port
    }

    /// From now on the connections that there are lead nowhere.
    pub(crate) fn swallow(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, lives: impl Fn() -> bool) {
    let mut space = [0; 16384];
    while let Ok(read @ 1..) = from.read(&mut space) {
        if lives() && to.write_all(&space[..read]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
