//! Fetching lists, once a minute at most, each list as often as the configuration says.
//!
//! A list is replaced only by one that was fetched whole, is well formed and not empty. Whatever else the address answers,
//! the list that is there stays.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use wasmdm_plugin::http::{self, Response};
use wasmdm_plugin::{Failure, Timestamp, error, info, kv, runtime};

use crate::{serial_number, settings, stored_list};

/// What is known about an address.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Status {
    /// Of the list that is stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    etag: Option<String>,
    /// How many serial numbers are stored.
    count: usize,
    /// When the address last gave a usable answer, or one that will not get better soon.
    checked_at: Timestamp,
    /// Why the last answer was not used.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// Fetches the lists that are due.
///
/// A failure of this hook discards what the call wrote, so an address that does not answer fails the call only if the call
/// wrote nothing; otherwise it stays due and the next tick tries it again. Nor does a failure that trying again cannot cure:
/// a dead letter each minute would help nobody, the log says it.
pub(crate) fn refresh_due_lists() -> Result<(), Failure> {
    let urls = settings::urls()?;
    let interval = settings::refresh_interval_ms()?;
    let mut wrote = false;
    let mut failed = None;
    for url in &urls {
        match refresh_if_due(url, interval) {
            Ok(fetched) => wrote |= fetched,
            Err(failure) => {
                error!("The list of {url} was not fetched: {}", failure.message; url = url, code = failure.code);
                failed = Some(failure.context(format_args!("fetching {url}")));
            }
        }
    }
    match failed {
        Some(failure) if !wrote && failure.retryable => Err(failure),
        None if !wrote => match stored_list::forget_one_other(&urls) {
            // Without an address no key-values are needed, and the operator may have granted none.
            Err(failure) if failure.code == "denied" && urls.is_empty() => Ok(()),
            forgotten => forgotten,
        },
        _ => Ok(()),
    }
}

/// Whether something was written. A failure means that the address could not be asked, and nothing was written.
fn refresh_if_due(url: &str, interval: u64) -> Result<bool, Failure> {
    let key = stored_list::status_key(url);
    let status: Option<Status> = kv::get_json(&key)?;
    let now = runtime::now();
    let due = |status: &Status| now >= status.checked_at.saturating_add(interval);
    if status.as_ref().is_some_and(|status| !due(status)) {
        return Ok(false);
    }
    let first = status.is_none();
    let status = status.unwrap_or_default();
    let status = match fetch(url, status.etag.as_deref()) {
        Ok(response) => take(url, &response, status)?,
        Err(failure) if failure.retryable => return Err(failure),
        // Too long, or not granted: no better in a minute.
        Err(failure) => Status { problem: Some(failure.message), ..status },
    };
    if let Some(problem) = &status.problem {
        error!("The list of {url} was not used, the one before stays: {problem}"; url = url);
    }
    if first {
        stored_list::remember(url)?;
    }
    kv::put_json(&key, &Status { checked_at: now, ..status })?;
    Ok(true)
}

fn fetch(url: &str, etag: Option<&str>) -> Result<Response, Failure> {
    let mut request = http::get(url).header("accept", "text/plain, application/json");
    // Without a list a validator is of no use: 304 would leave nothing.
    if let Some(etag) = etag
        && stored_list::is_there(url)?
    {
        request = request.header("if-none-match", etag);
    }
    let response = request.send()?;
    if matches!(response.status, 200 | 304) {
        return Ok(response);
    }
    match response.clone().success() {
        // Overload and outages pass: the tick fails and comes again.
        Err(failure) if failure.retryable => Err(failure),
        _ => Ok(response),
    }
}

/// Stores a list if the answer brings a good one. What is wrong with an answer that will be the same next time goes to the
/// status, so that it is not asked for again before the interval is over.
fn take(url: &str, response: &Response, status: Status) -> Result<Status, Failure> {
    let unused = |problem: String, status: Status| Status { problem: Some(problem), ..status };
    match response.status {
        304 => return Ok(Status { problem: None, ..status }),
        200 => {}
        other => return Ok(unused(format!("answered with status {other}"), status)),
    }
    let serial_numbers = match parse(&response.body) {
        Ok(serial_numbers) => serial_numbers,
        Err(problem) => return Ok(unused(problem, status)),
    };
    let count = serial_numbers.len();
    if let Err(failure) = stored_list::check_size(&serial_numbers) {
        return Ok(unused(failure.message, status));
    }
    stored_list::replace(url, &serial_numbers)?;
    info!("{count} serial numbers came from {url}"; url = url, count = count);
    let etag = response.header("etag").map(str::to_owned);
    Ok(Status { etag, count, problem: None, ..status })
}

/// Reads a list: a JSON array of strings, or text with one serial number a line and comments after `#`.
fn parse(body: &[u8]) -> Result<BTreeSet<String>, String> {
    let text = std::str::from_utf8(body).map_err(|error| format!("no UTF-8: {error}"))?;
    let text = text.trim_start_matches('\u{feff}').trim();
    let serial_numbers = if text.starts_with('[') { parse_json(text) } else { parse_lines(text) }?;
    if serial_numbers.is_empty() {
        return Err("the list is empty".to_owned());
    }
    Ok(serial_numbers)
}

fn parse_json(text: &str) -> Result<BTreeSet<String>, String> {
    let strings: Vec<String> = serde_json::from_str(text).map_err(|error| error.to_string())?;
    strings
        .iter()
        .enumerate()
        .map(|(number, text)| serial_number::listed(text).ok_or_else(|| format!("element {number} is no serial number")))
        .collect()
}

fn parse_lines(text: &str) -> Result<BTreeSet<String>, String> {
    let mut serial_numbers = BTreeSet::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default();
        if line.trim().is_empty() {
            continue;
        }
        let serial_number = serial_number::listed(line).ok_or_else(|| format!("line {} is no serial number", number + 1))?;
        serial_numbers.insert(serial_number);
    }
    Ok(serial_numbers)
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use wasmdm_plugin::http::{Request, Response};
    use wasmdm_plugin::{Failure, Schedule, mock};

    use super::parse;
    use crate::{SerialAllowList, stored_list};

    const URL: &str = "https://lists.example/serials";
    const MINUTE: u64 = 60_000;

    fn host_with_url() -> mock::Host {
        let host = mock::Host::new();
        host.set_config(json!({ "url": URL, "refresh_minutes": 15 }));
        host
    }

    fn tick(host: &mock::Host) -> Result<(), Failure> {
        host.call(|| SerialAllowList::tick(mock::call(), "refresh".to_owned(), host.now(), None, Vec::new()))
    }

    fn with_etag(body: &str, etag: &str) -> Response {
        let mut response = mock::response(200, body);
        response.headers.push(("ETag".to_owned(), etag.to_owned()));
        response
    }

    fn header(request: &Request, name: &str) -> Option<String> {
        let mut headers = request.headers.iter();
        headers.find(|header| header.name == name).map(|header| header.value.clone())
    }

    fn listed(serial_number: &str) -> Option<bool> {
        stored_list::contains(URL, serial_number).unwrap()
    }

    #[test]
    fn the_first_tick_fetches_and_the_next_waits_for_the_interval() {
        let host = host_with_url();
        host.respond(mock::response(200, "C02AAA\n"));
        tick(&host).unwrap();
        assert_eq!(listed("C02AAA"), Some(true));
        host.advance(14 * MINUTE);
        tick(&host).unwrap();
        assert_eq!(host.requests().len(), 1);
        host.advance(MINUTE);
        host.respond(mock::response(200, "C02BBB\n"));
        tick(&host).unwrap();
        assert_eq!((listed("C02AAA"), listed("C02BBB")), (Some(false), Some(true)));
    }

    #[test]
    fn an_unchanged_list_is_asked_for_by_its_etag_and_stays() {
        let host = host_with_url();
        host.respond(with_etag("C02AAA\n", "\"one\""));
        tick(&host).unwrap();
        host.advance(15 * MINUTE);
        host.respond(mock::response(304, ""));
        tick(&host).unwrap();
        host.advance(15 * MINUTE);
        host.respond(with_etag("C02BBB\n", "\"two\""));
        tick(&host).unwrap();
        let asked: Vec<_> = host.requests().iter().map(|request| header(request, "if-none-match")).collect();
        assert_eq!(asked, [None, Some("\"one\"".to_owned()), Some("\"one\"".to_owned())]);
        assert_eq!(listed("C02BBB"), Some(true));
    }

    #[test]
    fn no_bad_answer_replaces_the_last_good_list() {
        for (status, body) in [
            (200, ""),
            (200, "\n# nobody today\n\n"),
            (200, "[]"),
            (200, "[\"C02BBB\", 7]"),
            (200, "[\"C02BBB\""),
            (200, "{\"serials\": [\"C02BBB\"]}"),
            (200, "<html><body>Please log in</body></html>"),
            (200, "C02BBB\nan error occurred\n"),
            (404, "C02BBB\n"),
            (302, ""),
            (204, ""),
        ] {
            let host = host_with_url();
            host.respond(with_etag("C02AAA\n", "\"one\""));
            tick(&host).unwrap();
            host.advance(15 * MINUTE);
            host.respond(Response { status, ..with_etag(body, "\"bad\"") });
            tick(&host).unwrap();
            assert_eq!((listed("C02AAA"), listed("C02BBB")), (Some(true), Some(false)), "{status} {body}");
            let status_value = host.pairs().remove(&stored_list::status_key(URL)).unwrap();
            let kept: super::Status = serde_json::from_slice(&status_value).unwrap();
            assert_eq!(kept.etag.as_deref(), Some("\"one\""), "{status} {body}");
            assert!(kept.problem.is_some(), "{status} {body}");
        }
    }

    #[test]
    fn an_address_that_does_not_answer_fails_the_tick_and_keeps_the_list() {
        let host = host_with_url();
        host.respond(mock::response(200, "C02AAA\n"));
        tick(&host).unwrap();
        for failing in [429, 500, 503] {
            host.advance(15 * MINUTE);
            host.respond(mock::response(failing, "C02BBB\n"));
            assert!(tick(&host).unwrap_err().retryable);
            assert_eq!((listed("C02AAA"), listed("C02BBB")), (Some(true), Some(false)));
        }
        host.respond_with_failure(Failure::unavailable("no route"));
        assert!(tick(&host).unwrap_err().message.contains(URL));
    }

    #[test]
    fn one_silent_address_does_not_keep_the_others_from_being_stored() {
        let host = mock::Host::new();
        host.set_config(json!({ "url": ["https://silent.example", URL] }));
        host.respond_with_failure(Failure::unavailable("no route"));
        host.respond(mock::response(200, "C02AAA\n"));
        tick(&host).unwrap();
        assert_eq!(listed("C02AAA"), Some(true));
        // The silent one is due again at the next tick, and then nothing else is written.
        host.advance(MINUTE);
        host.respond_with_failure(Failure::unavailable("no route"));
        assert!(tick(&host).is_err());
        assert_eq!(host.requests().len(), 3);
    }

    #[test]
    fn four_full_answers_fit_into_one_call_and_replace_four_others() {
        let host = mock::Host::new();
        let urls: Vec<String> = (0..4).map(|number| format!("https://{number}.example")).collect();
        host.set_config(json!({ "url": urls }));
        for first in [0_u32, 1_000_000] {
            host.on_http(move |_| {
                let lines = (first..first + 87_000).map(|number| format!("C{number:010}\n"));
                Ok(mock::response(200, lines.collect::<String>()))
            });
            host.advance(15 * MINUTE);
            tick(&host).unwrap();
            assert!(host.host_calls() < 1_000, "{}", host.host_calls());
        }
        assert_eq!(stored_list::contains("https://3.example", "C0001000001").unwrap(), Some(true));
    }

    #[test]
    fn a_list_of_a_former_address_is_removed() {
        let host = host_with_url();
        host.respond(mock::response(200, "C02AAA\n"));
        tick(&host).unwrap();
        host.set_config(json!({ "serial_numbers": ["C02AAA"] }));
        tick(&host).unwrap();
        assert!(host.pairs().is_empty(), "{:?}", host.pairs().keys());
    }

    #[test]
    fn an_answer_that_the_host_refuses_is_not_asked_for_again_each_minute() {
        let host = host_with_url();
        host.respond(mock::response(200, "C02AAA\n"));
        tick(&host).unwrap();
        host.advance(15 * MINUTE);
        host.respond(mock::response(200, "C".repeat(2 * 1024 * 1024)));
        tick(&host).unwrap();
        host.advance(MINUTE);
        tick(&host).unwrap();
        assert_eq!(host.requests().len(), 2);
        assert_eq!(listed("C02AAA"), Some(true));
    }

    #[test]
    fn without_an_address_nothing_needs_to_be_granted() {
        let host = mock::Host::new();
        host.set_config(json!({ "serial_numbers": ["C02AAA"] }));
        host.refuse("kv", Failure::new("denied", "not granted"));
        host.refuse("http", Failure::new("denied", "not granted"));
        assert_eq!(tick(&host), Ok(()));
    }

    #[test]
    fn text_and_json_lists_are_read() {
        let expected = vec!["C02AAA", "C02BBB"];
        for body in ["C02AAA\nC02BBB\n", "\u{feff}# ours\r\n c02bbb # Jo's\r\n\r\nC02AAA\r\nC02AAA", " [\"C02BBB\", \" c02aaa\"] "] {
            let read = parse(body.as_bytes()).unwrap();
            assert_eq!(read.iter().collect::<Vec<_>>(), expected, "{body}");
        }
        assert!(parse(b"C02AAA\n\xff\n").is_err());
    }
}
