//! Decisions of policy hooks.

use serde_json::json;

use crate::Decision;

impl Decision {
    fn verdict(verdict: &str) -> Self {
        Self { verdict: verdict.to_owned(), reason: None, detail: None }
    }

    /// No opinion: the other plugins decide, and if all abstain the device may enroll.
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
