//! `log`: lines of the plugin in the server's log, bounded and escaped.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};

use parking_lot::Mutex;

use crate::bindings::wasmdm::plugin::log::{Host, Level};
use crate::call::State;
use crate::contract::printable;
use crate::effective::Limits;
use crate::plugin::Shared;

/// Lines of all calls of a plugin in the present second.
#[derive(Debug, Default)]
pub(crate) struct Rate {
    second: AtomicI64,
    lines: AtomicU32,
}

impl Rate {
    /// Two threads at the turn of a second may let a line more through.
    fn permits(&self, second: i64, limit: u32) -> bool {
        if self.second.swap(second, Ordering::Relaxed) != second {
            self.lines.store(0, Ordering::Relaxed);
        }
        self.lines.fetch_add(1, Ordering::Relaxed) < limit
    }
}

/// The log of one call: the import, standard output and standard error share its limits.
#[derive(Debug)]
pub(crate) struct CallLog {
    shared: Arc<Shared>,
    limits: Limits,
    spent: Mutex<Spent>,
}

#[derive(Debug, Default)]
struct Spent {
    lines: u32,
    bytes: usize,
    dropped: u32,
    /// The last line of standard output and of standard error, not yet ended.
    open: [Vec<u8>; 2],
}

/// Standard output or standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Out,
    Err,
}

impl CallLog {
    pub(crate) fn new(shared: Arc<Shared>, limits: Limits) -> Self {
        Self { shared, limits, spent: Mutex::default() }
    }

    /// One line; dropped and counted when a limit is reached.
    pub(crate) fn line(&self, level: Level, message: &str, fields: &[(String, String)]) {
        let mut spent = self.spent.lock();
        self.write(&mut spent, level, message, fields);
    }

    fn write(&self, spent: &mut Spent, level: Level, message: &str, fields: &[(String, String)]) {
        let line = self.limits.log_line;
        let message = printable(message, line);
        let mut left = line.saturating_sub(message.len());
        let mut text = String::new();
        for (name, value) in fields.iter().take(16) {
            let field = format!("{}={} ", printable(name, 64), printable(value, left));
            if field.len() > left {
                break;
            }
            left = left.saturating_sub(field.len());
            text.push_str(&field);
        }
        let bytes = spent.bytes.saturating_add(message.len()).saturating_add(text.len());
        let second = self.shared.services.clock.now().as_millis().div_euclid(1_000);
        if spent.lines >= self.limits.log_lines
            || bytes > self.limits.log_bytes
            || !self.shared.log_rate.permits(second, self.limits.log_lines_per_second)
        {
            spent.dropped = spent.dropped.saturating_add(1);
            return;
        }
        spent.lines = spent.lines.saturating_add(1);
        spent.bytes = bytes;
        let fields = text.trim_end();
        let plugin = self.shared.identity.name.as_str();
        match level {
            Level::Trace => tracing::trace!(target: "plugin", plugin, fields, "{message}"),
            Level::Debug => tracing::debug!(target: "plugin", plugin, fields, "{message}"),
            Level::Info => tracing::info!(target: "plugin", plugin, fields, "{message}"),
            Level::Warn => tracing::warn!(target: "plugin", plugin, fields, "{message}"),
            Level::Error => tracing::error!(target: "plugin", plugin, fields, "{message}"),
        }
    }

    /// Bytes of a stream; whole lines go to the log.
    pub(crate) fn print(&self, stream: Stream, bytes: &[u8]) {
        let mut spent = self.spent.lock();
        let (level, n) = if stream == Stream::Out { (Level::Info, 0) } else { (Level::Warn, 1) };
        let mut open = spent.open.get_mut(n).map(std::mem::take).unwrap_or_default();
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            // A line without end is cut like any other.
            let room = self.limits.log_line.saturating_sub(open.len());
            open.extend(part.iter().take(room));
            if part.ends_with(b"\n") {
                self.end_line(&mut spent, level, &open);
                open.clear();
            }
        }
        if let Some(place) = spent.open.get_mut(n) {
            *place = open;
        }
    }

    fn end_line(&self, spent: &mut Spent, level: Level, line: &[u8]) {
        let line = String::from_utf8_lossy(line);
        let line = line.trim_end();
        if !line.is_empty() {
            self.write(spent, level, line, &[]);
        }
    }

    /// Ends open lines and tells how many lines were dropped.
    pub(crate) fn finish(&self) -> u32 {
        let mut spent = self.spent.lock();
        let [out, err] = std::mem::take(&mut spent.open);
        self.end_line(&mut spent, Level::Info, &out);
        self.end_line(&mut spent, Level::Warn, &err);
        if spent.dropped > 0 {
            tracing::debug!("{} lines of plugin {} were above its limits of log", spent.dropped, self.shared.identity.name);
        }
        spent.dropped
    }
}

impl Host for State {
    async fn write(&mut self, severity: Level, message: String, fields: Vec<(String, String)>) -> wasmtime::Result<()> {
        self.enter()?;
        self.log.line(severity, &message, &fields);
        Ok(())
    }
}
