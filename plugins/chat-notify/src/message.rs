//! Messages from templates: `{name}` is replaced, `{{` and `}}` are braces.

use wasmdm_plugin::{Event, EventData, Facts, Failure};

use crate::settings::Settings;

/// Characters of a message. Rooms cut or refuse longer ones.
const LONGEST: usize = 3000;

/// Characters of one value: what a device calls itself must not fill the room.
const LONGEST_VALUE: usize = 200;

/// All names that a template may use.
const NAMES: [&str; 12] =
    ["topic", "event", "enrollment", "device", "kind", "serial_number", "model", "os_version", "request_type", "status", "error", "command_uuid"];

/// A piece of a template.
#[derive(Debug, PartialEq, Eq)]
enum Piece<'a> {
    Text(&'a str),
    Name(&'a str),
}

/// What an event says by its template.
pub(crate) fn text(settings: &Settings, event: &Event) -> Result<String, Failure> {
    let known = Known::new(event)?;
    let mut text = String::new();
    for piece in pieces(settings.template(&event.topic)).map_err(Failure::invalid)? {
        match piece {
            Piece::Text(piece) => text.push_str(piece),
            Piece::Name(name) => {
                let value = shown(&known.value(event, name), settings.escape);
                text.push_str(if value.is_empty() { "unknown" } else { &value });
            }
        }
    }
    Ok(shortened(&text, LONGEST))
}

/// Checks a template; the problem if there is one.
pub(crate) fn check(template: &str) -> Result<(), String> {
    for piece in pieces(template)? {
        if let Piece::Name(name) = piece
            && !NAMES.contains(&name)
        {
            return Err(format!("`{{{name}}}` is unknown; there are {}", NAMES.join(", ")));
        }
    }
    Ok(())
}

fn pieces(template: &str) -> Result<Vec<Piece<'_>>, String> {
    let mut pieces = Vec::new();
    let mut rest = template;
    while let Some(at) = rest.find(['{', '}']) {
        let (text, from_brace) = rest.split_at(at);
        pieces.push(Piece::Text(text));
        if let Some(after) = from_brace.strip_prefix("{{") {
            pieces.push(Piece::Text("{"));
            rest = after;
        } else if let Some(after) = from_brace.strip_prefix("}}") {
            pieces.push(Piece::Text("}"));
            rest = after;
        } else {
            let inner = from_brace.strip_prefix('{').and_then(|inner| inner.split_once('}'));
            let (name, after) = inner.ok_or("a brace without its partner; write {{ or }} for a brace")?;
            pieces.push(Piece::Name(name));
            rest = after;
        }
    }
    pieces.push(Piece::Text(rest));
    Ok(pieces)
}

/// What the event and its enrollment say.
struct Known {
    facts: Facts,
    data: EventData,
}

impl Known {
    fn new(event: &Event) -> Result<Self, Failure> {
        let facts = event.who.as_ref().map(wasmdm_plugin::Enrollment::read_facts).transpose()?;
        let data = event.read_data()?;
        Ok(Self { facts: facts.unwrap_or_default(), data })
    }

    fn value(&self, event: &Event, name: &str) -> String {
        let who = event.who.as_ref();
        let command = self.data.command.as_ref();
        let value = match name {
            "topic" => Some(event.topic.clone()),
            "event" => Some(event.id.clone()),
            "enrollment" => who.map(|who| who.id.clone()),
            "device" => self.facts.serial_number.clone().or_else(|| who.map(|who| who.id.clone())),
            "kind" => who.map(|who| who.kind.clone()),
            "serial_number" => self.facts.serial_number.clone(),
            "model" => self.facts.model_name.clone().or_else(|| self.facts.model.clone()),
            "os_version" => self.facts.os_version.clone(),
            "request_type" => command.map(|command| command.request_type.clone()),
            "status" => command.map(|command| command.status.clone()),
            "error" => command.and_then(|command| command.error_chain.as_ref()).and_then(first_description),
            "command_uuid" => command.map(|command| command.uuid.clone()),
            _ => None,
        };
        value.unwrap_or_default()
    }
}

/// The words of the first error of an `ErrorChain`, in English if they are there.
fn first_description(chain: &serde_json::Value) -> Option<String> {
    let first = chain.get(0)?;
    let text = first.get("USEnglishDescription").or_else(|| first.get("LocalizedDescription"))?;
    Some(text.as_str()?.to_owned())
}

/// A value as the room may see it. It comes from a device, which may say anything: mentions, links, control characters.
fn shown(value: &str, escape: bool) -> String {
    let mut shown = String::new();
    for character in shortened(value, LONGEST_VALUE).chars() {
        match character {
            '&' if escape => shown.push_str("&amp;"),
            '<' if escape => shown.push_str("&lt;"),
            '>' if escape => shown.push_str("&gt;"),
            // Not at the start of a word: nobody is called by it.
            '@' => shown.push_str("@\u{200b}"),
            control if control.is_control() => shown.push(' '),
            other => shown.push(other),
        }
    }
    shown
}

fn shortened(text: &str, longest: usize) -> String {
    match text.char_indices().nth(longest) {
        None => text.to_owned(),
        Some((at, _)) => format!("{}…", text.get(..at).unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use wasmdm_plugin::{Event, EventSink, Failure, mock};

    use crate::ChatNotify;

    fn errored() -> Event {
        let command = json!({
            "uuid": "C-1", "request_type": "InstallProfile", "status": "errored",
            "error_chain": [{ "ErrorCode": 4001, "USEnglishDescription": "Profile <broken> & bad" }],
        });
        let facts = json!({ "serial_number": "C02AAA", "model": "Mac15,3", "os_version": "26.1" });
        Event { who: Some(mock::enrollment("UDID-1", facts)), ..mock::event("command.errored", json!({ "command": command })) }
    }

    fn handle(host: &mock::Host, event: Event) -> Result<(), Failure> {
        host.call(|| ChatNotify::handle(mock::call(), event))
    }

    fn told(config: Value, event: Event) -> String {
        let host = mock::Host::new();
        host.set_config(config);
        host.respond(mock::response(200, "ok"));
        handle(&host, event).unwrap();
        let requests = host.requests();
        let body: Value = serde_json::from_slice(requests[0].body.as_deref().unwrap()).unwrap();
        body["text"].as_str().unwrap().to_owned()
    }

    #[test]
    fn an_event_is_posted_to_the_secret_address() {
        let host = mock::Host::new();
        host.respond(mock::response(200, "ok"));
        handle(&host, errored()).unwrap();
        let requests = host.requests();
        assert_eq!(requests.len(), 1);
        let request = &requests[0];
        assert_eq!((request.method.as_str(), request.url.as_str(), request.url_template), ("POST", "${chat_url}", true));
        assert_eq!(request.body.as_deref(), Some(&br#"{"text":"command.errored: C02AAA"}"#[..]));
        assert!(request.headers.iter().any(|header| header.name == "content-type" && header.value == "application/json"));
        assert!(request.headers.iter().any(|header| header.name == "idempotency-key" && header.value == "event-1"));
    }

    #[test]
    fn a_topic_may_have_a_template_of_its_own() {
        let config = json!({
            "message": "other",
            "messages": { "command.errored": "{serial_number} ({model}, {os_version}): {request_type} {status}: {error} {{{enrollment}}}" },
        });
        assert_eq!(told(config.clone(), errored()), "C02AAA (Mac15,3, 26.1): InstallProfile errored: Profile &lt;broken&gt; &amp; bad {UDID-1}");
        assert_eq!(told(config, mock::event("enrollment.enrolled", json!({}))), "other");
    }

    #[test]
    fn what_is_not_known_is_called_unknown() {
        let event = mock::event("enrollment.enrolled", json!({}));
        assert_eq!(told(json!({ "message": "{serial_number} {error}" }), event), "unknown unknown");
    }

    #[test]
    fn devices_cannot_call_people_or_break_the_line() {
        let mut event = errored();
        let name = format!("<!channel> @here\n{}", "x".repeat(500));
        event.who = Some(mock::enrollment("UDID-1", json!({ "serial_number": name })));
        let text = told(json!({ "message": "{serial_number}" }), event);
        assert!(text.starts_with("&lt;!channel&gt; @\u{200b}here x"), "{text}");
        assert!(!text.contains('\n') && text.ends_with('…'));
        assert!(text.chars().count() < 250);
    }

    #[test]
    fn of_a_long_report_the_short_parts_are_told() {
        let mut event = errored();
        event.data = mock::input(json!({ "command": { "uuid": "C-1", "request_type": "ProfileList" } }));
        event.data.truncated = true;
        let text = told(json!({ "message": "{request_type} {error}" }), event);
        assert_eq!(text, "ProfileList unknown");
    }

    #[test]
    fn a_busy_room_is_told_later_and_one_that_refuses_is_not() {
        for (status, retry_after, expected) in [
            (429, Some("30"), (true, Some(30_000))),
            (500, None, (true, None)),
            (503, Some("1"), (true, Some(1_000))),
            (400, None, (false, None)),
            (404, None, (false, None)),
            (302, None, (false, None)),
        ] {
            let host = mock::Host::new();
            let mut response = mock::response(status, "");
            response.headers.extend(retry_after.map(|after| ("retry-after".to_owned(), after.to_owned())));
            host.respond(response);
            let failure = handle(&host, errored()).unwrap_err();
            assert_eq!((failure.retryable, failure.retry_after_ms), expected, "{status}");
        }
        let host = mock::Host::new();
        host.respond_with_failure(Failure::unavailable("no route"));
        assert!(handle(&host, errored()).unwrap_err().retryable);
    }
}
