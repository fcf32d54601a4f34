//! Decisions: of the policy hooks, and about users who log in.

use serde_json::json;

use crate::Decision;

impl Decision {
    fn verdict(verdict: &str) -> Self {
        Self { verdict: verdict.to_owned(), reason: None, detail: None }
    }

    /// No opinion: the other plugins decide, and if all abstain the device may enroll. About a user: as if the plugin was
    /// not there.
    pub fn abstain() -> Self {
        Self::verdict("abstain")
    }

    /// The device may enroll, unless another plugin denies or quarantines it.
    pub fn allow() -> Self {
        Self::verdict("allow")
    }

    /// The device may not enroll. The reason is in the answer to the device, the log and the audit.
    ///
    /// ```
    /// use wasmdm_plugin::Decision;
    /// let decision = Decision::deny("not one of ours");
    /// assert_eq!((decision.verdict.as_str(), decision.reason.as_deref()), ("deny", Some("not one of ours")));
    /// ```
    pub fn deny(reason: impl Into<String>) -> Self {
        Self { reason: Some(reason.into()), ..Self::verdict("deny") }
    }

    /// The device enrolls, but gets only commands of a person or of this plugin until it is released.
    pub fn quarantine(reason: impl Into<String>) -> Self {
        Self { reason: Some(reason.into()), ..Self::verdict("quarantine") }
    }

    /// About a user: not to be managed until the next login.
    pub fn decline() -> Self {
        Self::verdict("decline")
    }

    /// About a user, to the first message: managed without a proof.
    pub fn no_challenge() -> Self {
        Self::verdict("no-challenge")
    }

    /// About a user, to the first message: what the digest is to be made of.
    ///
    /// ```
    /// use wasmdm_plugin::Decision;
    /// assert_eq!(Decision::challenge("nonce").detail.as_deref(), Some(r#"{"DigestChallenge":"nonce"}"#));
    /// ```
    pub fn challenge(challenge: impl Into<String>) -> Self {
        Self { detail: Some(json!({ "DigestChallenge": challenge.into() }).to_string()), ..Self::verdict("challenge") }
    }

    /// About a user, to the second message: the digest is right, and this is the token of the user's channel.
    pub fn auth_token(token: impl Into<String>) -> Self {
        Self { detail: Some(json!({ "AuthToken": token.into() }).to_string()), ..Self::verdict("auth-token") }
    }

    /// About a user, to the second message: the digest is wrong.
    pub fn reject() -> Self {
        Self::verdict("reject")
    }

    /// The same, with tags that the enrollment gets once it is stored.
    ///
    /// ```
    /// use wasmdm_plugin::Decision;
    /// assert_eq!(Decision::allow().with_tags(["lab"]).detail.as_deref(), Some(r#"{"tags":["lab"]}"#));
    /// ```
    #[must_use]
    pub fn with_tags<Tag: Into<String>>(mut self, tags: impl IntoIterator<Item = Tag>) -> Self {
        let tags: Vec<String> = tags.into_iter().map(Into::into).collect();
        self.detail = Some(json!({ "tags": tags }).to_string());
        self
    }
}
