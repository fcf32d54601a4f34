//! The hooks that the server calls, one trait each, and the macro that exports them.

/// Called once per tenant before a new version or configuration of the plugin becomes active.
///
/// `validate_config` gets the configuration as a JSON document. The message of a failure reaches the operator, and the
/// version that is active stays active.
pub use crate::bindings::lifecycle::exports::wasmdm::plugin::lifecycle::Guest as Lifecycle;

/// Decides whether a device may enroll, before anything about it is stored.
///
/// `decide` gets the candidate with its facts, the Authenticate message (redacted), and whether the enrollment is known
/// already. A deny is answered with 403; a failure with 503, and the device tries again.
pub use crate::bindings::enrollment_policy::exports::wasmdm::plugin::enrollment_policy::Guest as EnrollmentPolicy;

/// Says who a user of a Mac is, and gives the token with which the user's channel goes on. One plugin of a tenant has it.
///
/// `answer` gets the message (redacted) and the digest, which is absent in the first of the two messages. A failure
/// declines the user until the next login.
///
/// ```
/// use wasmdm_plugin::{CallInfo, Decision, Enrollment, Failure, Input, UserAuthentication, crypto, kv};
///
/// struct Directory;
///
/// # fn is_right(_user: &str, _challenge: &[u8], _digest: &str) -> bool { true }
/// impl UserAuthentication for Directory {
///     fn answer(_: CallInfo, who: Enrollment, _: Input, digest: Option<String>) -> Result<Decision, Failure> {
///         let key = format!("challenge/{}", who.id);
///         let Some(digest) = digest else {
///             let nonce: String = crypto::random(8)?.iter().map(|byte| format!("{byte:02x}")).collect();
///             let challenge = format!("Digest realm=\"school\", nonce=\"{nonce}\"");
///             kv::put_for(&key, challenge.as_bytes(), 300)?;
///             return Ok(Decision::challenge(challenge));
///         };
///         let Some(challenge) = kv::get(&key)? else { return Ok(Decision::reject()) };
///         kv::remove(&key)?;
///         let user = who.read_facts()?.user_short_name.unwrap_or_default();
///         Ok(if is_right(&user, &challenge, &digest) { Decision::auth_token("a token of this user") } else { Decision::reject() })
///     }
/// }
///
/// wasmdm_plugin::export!(Directory: UserAuthentication);
/// # fn main() {}
/// ```
pub use crate::bindings::user_authentication::exports::wasmdm::plugin::user_authentication::Guest as UserAuthentication;

/// Makes tokens that devices ask for with GetToken. The manifest names the service types, and each has one plugin of a
/// tenant.
///
/// `get_token` gets the service type and `TokenParameters` as JSON, whole. Without a token the device is answered 400; a
/// failure is answered 503, and the device tries again.
///
/// ```
/// use wasmdm_plugin::{CallInfo, Enrollment, Failure, TokenSource, config};
///
/// struct Tokens;
///
/// impl TokenSource for Tokens {
///     fn get_token(_: CallInfo, who: Enrollment, _: String, _: Option<String>) -> Result<Option<Vec<u8>>, Failure> {
///         let tokens: std::collections::BTreeMap<String, String> = config()?;
///         let serial = who.read_facts()?.serial_number.unwrap_or_default();
///         Ok(tokens.get(&serial).map(|token| token.clone().into_bytes()))
///     }
/// }
///
/// wasmdm_plugin::export!(Tokens: TokenSource);
/// # fn main() {}
/// ```
pub use crate::bindings::token_source::exports::wasmdm::plugin::token_source::Guest as TokenSource;

/// Says with what a device returns to service that is about to erase itself. One plugin of a tenant has it.
///
/// `configuration` answers Apple's dictionary as JSON: [`return_to_service`](crate::return_to_service) makes it. Without
/// one the device does not return; a failure is answered 503, and the device tries again.
pub use crate::bindings::return_to_service::exports::wasmdm::plugin::return_to_service::Guest as ReturnToService;

/// Answers events with commands for the enrollment that the event is about.
///
/// The returned commands are the only effect of `generate`, and are queued once per event however often it is delivered.
pub use crate::bindings::event_commands::exports::wasmdm::plugin::event_commands::Guest as EventCommands;

/// Gets subscribed events for their side effects: at least once each, in order per device.
pub use crate::bindings::event_sink::exports::wasmdm::plugin::event_sink::Guest as EventSink;

/// Gets the ticks of the manifest's cron entries (`who` is absent) and the timers that the plugin has set.
pub use crate::bindings::schedule::exports::wasmdm::plugin::schedule::Guest as Schedule;

/// Exports hooks from a plugin: the type that implements them, then the traits.
///
/// Only what is named here is exported, so name every hook that the plugin implements. Built natively, the macro just
/// checks that the traits are implemented.
///
/// ```
/// use wasmdm_plugin::{CallInfo, Event, EventSink, Failure, Lifecycle};
///
/// struct Mine;
///
/// impl Lifecycle for Mine {
///     fn validate_config(_: CallInfo, _document: String) -> Result<(), Failure> {
///         Ok(())
///     }
/// }
///
/// impl EventSink for Mine {
///     fn handle(_: CallInfo, occurrence: Event) -> Result<(), Failure> {
///         wasmdm_plugin::info!("{} happened", occurrence.topic);
///         Ok(())
///     }
/// }
///
/// wasmdm_plugin::export!(Mine: Lifecycle, EventSink);
/// # fn main() {}
/// ```
///
/// ```compile_fail
/// struct Mine;
/// wasmdm_plugin::export!(Mine: EventSink); // EventSink is not implemented
/// # fn main() {}
/// ```
#[macro_export]
macro_rules! export {
    ($plugin:ident : $($hook:ident),+ $(,)?) => {
        $( $crate::__export_hook!($plugin, $hook); )+
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __export_hook {
    ($plugin:ident, Lifecycle) => {
        $crate::__export_in!($plugin, lifecycle, Lifecycle);
    };
    ($plugin:ident, EnrollmentPolicy) => {
        $crate::__export_in!($plugin, enrollment_policy, EnrollmentPolicy);
    };
    ($plugin:ident, UserAuthentication) => {
        $crate::__export_in!($plugin, user_authentication, UserAuthentication);
    };
    ($plugin:ident, TokenSource) => {
        $crate::__export_in!($plugin, token_source, TokenSource);
    };
    ($plugin:ident, ReturnToService) => {
        $crate::__export_in!($plugin, return_to_service, ReturnToService);
    };
    ($plugin:ident, EventCommands) => {
        $crate::__export_in!($plugin, event_commands, EventCommands);
    };
    ($plugin:ident, EventSink) => {
        $crate::__export_in!($plugin, event_sink, EventSink);
    };
    ($plugin:ident, Schedule) => {
        $crate::__export_in!($plugin, schedule, Schedule);
    };
    ($plugin:ident, $other:ident) => {
        compile_error!(concat!(
            "`",
            stringify!($other),
            "` is no hook: there are Lifecycle, EnrollmentPolicy, UserAuthentication, TokenSource, ReturnToService, \
             EventCommands, EventSink and Schedule"
        ));
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __export_in {
    ($plugin:ident, $module:ident, $trait:ident) => {
        // The exported symbols contain `#`, which native linkers refuse.
        #[cfg(target_family = "wasm")]
        $crate::bindings::$module::export!($plugin with_types_in $crate::bindings::$module);
        #[cfg(not(target_family = "wasm"))]
        const _: () = {
            const fn implements<Plugin: $crate::hooks::$trait>() {}
            implements::<$plugin>();
        };
    };
}
