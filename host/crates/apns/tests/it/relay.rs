//! What stands between client and service: a relay that can stop relaying without ending the connections, and a proxy.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

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

/// A proxy that gives every CONNECT the same answer, and leads on if that is 200.
pub(crate) struct ConnectProxy {
    port: u16,
    heads: Arc<Mutex<Vec<String>>>,
}

impl ConnectProxy {
    pub(crate) fn start(answer: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let heads = Arc::<Mutex<Vec<String>>>::default();
        let kept = Arc::clone(&heads);
        std::thread::spawn(move || {
            while let Ok((mut client, _)) = listener.accept() {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    client.read_exact(&mut byte).unwrap();
                    head.push(byte[0]);
                }
                let head = String::from_utf8(head).unwrap();
                let target = head.split(' ').nth(1).unwrap().to_owned();
                kept.lock().unwrap().push(head);
                client.write_all(answer.as_bytes()).unwrap();
                if answer.starts_with("HTTP/1.1 200") {
                    let service = TcpStream::connect(target).unwrap();
                    for (from, to) in [(client.try_clone().unwrap(), service.try_clone().unwrap()), (service, client)] {
                        std::thread::spawn(move || pass(from, to, || true));
                    }
                }
            }
        });
        Self { port, heads }
    }

    pub(crate) const fn port(&self) -> u16 {
        self.port
    }

    /// What each connection began with.
    pub(crate) fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap().clone()
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
