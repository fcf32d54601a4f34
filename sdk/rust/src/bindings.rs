//! What `wit-bindgen` makes of the contract: one world for all imports, and one for each hook.
//!
//! A world with all hooks would force every plugin to implement all of them, because an exported interface is all or
//! nothing. The hooks' worlds share the types of the first one; the linker merges what a plugin really uses.

#![expect(clippy::pedantic, reason = "generated code")]

pub mod capabilities {
    wit_bindgen::generate!({
        path: "wit",
        world: "capabilities",
        generate_all,
        additional_derives: [Clone, PartialEq],
    });
}

macro_rules! hook {
    ($module:ident, $inline:literal) => {
        pub mod $module {
            wit_bindgen::generate!({
                path: "wit",
                inline: $inline,
                with: { "wasmdm:plugin/types@0.1.0": crate::bindings::capabilities::wasmdm::plugin::types },
                generate_all,
                pub_export_macro: true,
            });
        }
    };
}

hook!(lifecycle, "package wasmdm:sdk; world lifecycle { export wasmdm:plugin/lifecycle@0.1.0; }");
hook!(enrollment_policy, "package wasmdm:sdk; world enrollment-policy { export wasmdm:plugin/enrollment-policy@0.1.0; }");
hook!(user_authentication, "package wasmdm:sdk; world user-authentication { export wasmdm:plugin/user-authentication@0.1.0; }");
hook!(token_source, "package wasmdm:sdk; world token-source { export wasmdm:plugin/token-source@0.1.0; }");
hook!(return_to_service, "package wasmdm:sdk; world return-to-service { export wasmdm:plugin/return-to-service@0.1.0; }");
hook!(event_commands, "package wasmdm:sdk; world event-commands { export wasmdm:plugin/event-commands@0.1.0; }");
hook!(event_sink, "package wasmdm:sdk; world event-sink { export wasmdm:plugin/event-sink@0.1.0; }");
hook!(schedule, "package wasmdm:sdk; world schedule { export wasmdm:plugin/schedule@0.1.0; }");
