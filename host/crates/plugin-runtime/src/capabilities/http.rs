//! `http`: outbound requests to granted hosts, by the rules of [`crate::egress`].

use std::time::Duration;

use crate::bindings::wasmdm::plugin::http::{Host, Request, Response};
use crate::call::State;
use crate::capabilities::{Denied, failure, not_granted, not_here, quota};
use crate::egress;
use crate::hook::Http;

impl State {
    async fn send_request(&mut self, outgoing: Request) -> Result<Response, Denied> {
        if self.permissions.http == Http::Never {
            return Err(not_here("sending requests", self.hook));
        }
        let Some(grant) = &self.settings.capabilities.http else { return Err(not_granted("http")) };
        if self.permissions.http == Http::IfSync && !grant.sync_hooks {
            return Err(not_granted(&format!("http-sync, without which there are no requests in {},", self.hook)));
        }
        let limits = &self.settings.limits;
        if self.http_calls >= limits.http_calls {
            return Err(quota(format!("a call can send {} requests", limits.http_calls)));
        }
        self.http_calls = self.http_calls.saturating_add(1);
        let asked = outgoing.timeout_ms.map(|millis| Duration::from_millis(u64::from(millis)));
        let timeout = asked.unwrap_or(limits.http_timeout).min(limits.http_timeout).min(self.remaining());
        let request = egress::Request {
            method: outgoing.method,
            url: outgoing.url,
            url_template: outgoing.url_template,
            headers: outgoing
                .headers
                .into_iter()
                .map(|header| egress::Header { name: header.name, value: header.value, template: header.template })
                .collect(),
            body: outgoing.body.map(Into::into),
            timeout: Some(timeout),
        };
        let client = self.shared.services.egress.clone();
        // Boxed: the futures of an HTTP client are large.
        let answer = Box::pin(client.send(&grant.policy, request)).await;
        answer
            .map(|response| Response { status: response.status, headers: response.headers, body: response.body.to_vec() })
            .map_err(|error| Denied { retryable: error.retryable, ..failure(error.code, error.message) })
    }
}

impl Host for State {
    async fn send(&mut self, outgoing: Request) -> wasmtime::Result<Result<Response, Denied>> {
        self.enter()?;
        Ok(self.send_request(outgoing).await)
    }
}
