//! What all plugins share: the engine, the linker with every import, and the services behind the imports.

use std::sync::Arc;

use wasmdm_service::clock::Clock;
use wasmdm_storage::Storage;
use wasmtime::component::{HasSelf, Linker};

use crate::bindings::Everything;
use crate::call::{Sandbox, State};
use crate::egress;
use crate::engine::{EngineError, Engines};

/// Shared by all plugins of a server.
pub struct Runtime {
    pub(crate) engines: Engines,
    pub(crate) linker: Linker<Sandbox>,
    pub(crate) services: Services,
}

/// What stands behind the imports.
#[derive(Debug, Clone)]
pub struct Services {
    /// `None` for tools that check plugins without a server: then stateful imports answer `unavailable`.
    pub storage: Option<Storage>,
    pub clock: Arc<dyn Clock>,
    pub egress: egress::Client,
    /// This server's version, as plugins and operators see it.
    pub server_version: String,
}

impl Runtime {
    /// Defines every import of the contract and of WASI 0.2.
    pub fn new(engines: Engines, services: Services) -> Result<Arc<Self>, EngineError> {
        let mut linker = Linker::new(engines.engine());
        // Everything of WASI is linked, because some toolchains import it unused; files and sockets refuse (see `capabilities::wasi`).
        wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
        Everything::add_to_linker::<Sandbox, HasSelf<State>>(&mut linker, |sandbox| &mut sandbox.call)?;
        Ok(Arc::new(Self { engines, linker, services }))
    }

    /// The engine.
    pub const fn engines(&self) -> &Engines {
        &self.engines
    }
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runtime").field("engines", &self.engines).field("services", &self.services).finish_non_exhaustive()
    }
}
