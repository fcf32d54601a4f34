//! What a plugin said of users of Macs.

use crate::fixture::*;
use wasmdm_storage::user_verdicts::KeepUserVerdict;

fn verdict(user: &str, verdict: &'static str, is_managed: bool) -> KeepUserVerdict {
    KeepUserVerdict { tenant: default(), device: id("A"), user: id(&format!("A:{user}")), verdict, is_managed, auth_token: None, now: at(5) }
}

/// A user of the device `A` who proved who they are.
pub(crate) fn given(user: &str, token: &str) -> KeepUserVerdict {
    KeepUserVerdict { auth_token: Some(token.to_owned()), ..verdict(user, "auth-token", true) }
}

async fn refusal(database: &Database, user: &str, token: Option<&str>) -> Option<String> {
    let standing = database.storage().user_standing(&default(), &id("A"), &id(&format!("A:{user}"))).await.unwrap();
    assert!(!format!("{standing:?}").contains("token-of"));
    standing.and_then(|standing| standing.refusal(token))
}

/// Edge case 33.
pub(crate) async fn what_was_last_said_of_a_user_stands_until_something_else_is_said(database: &Database) {
    database.enroll("A").await;
    let keep = async |new: KeepUserVerdict| assert!(database.storage().keep_user_verdict(new).await.unwrap());
    assert_eq!(refusal(database, "jo", None).await, None, "nobody has said anything");
    for turned_away in ["decline", "challenge", "reject", "failure"] {
        keep(verdict("jo", turned_away, false)).await;
        assert!(refusal(database, "jo", None).await.unwrap().contains(turned_away));
        keep(verdict("jo", "no-challenge", true)).await;
        assert_eq!(refusal(database, "jo", None).await, None);
    }
    keep(verdict("jo", "decline", false)).await;
    database.restart().await;
    // The next enrollment of the device is not the user's next login.
    database.authenticate("A", 10).await;
    assert!(refusal(database, "jo", None).await.is_some());
    assert_eq!(refusal(database, "al", None).await, None, "each user has their own");
    let elsewhere = database.storage().user_standing(&default(), &id("B"), &id("A:jo")).await.unwrap();
    assert!(elsewhere.is_none(), "of another device's user of the same id");
    for _ in 0..2 {
        database.storage().forget_user_verdict(&default(), &id("A"), &id("A:jo")).await.unwrap();
        assert_eq!(refusal(database, "jo", None).await, None);
    }
}

/// Edge case 33.
pub(crate) async fn a_token_that_was_given_is_compared_where_one_is_brought(database: &Database) {
    database.enroll("A").await;
    database.storage().keep_user_verdict(given("jo", "token-of-jo")).await.unwrap();
    for (brought, is_taken) in [(None, true), (Some("token-of-jo"), true), (Some("token-of-al"), false), (Some(""), false)] {
        assert_eq!(refusal(database, "jo", brought).await.is_none(), is_taken, "{brought:?}");
    }
    // No token was given, so none is expected.
    database.storage().keep_user_verdict(verdict("jo", "no-challenge", true)).await.unwrap();
    assert_eq!(refusal(database, "jo", Some("token-of-al")).await, None);
}

/// A device could have one of its users forgotten who was turned away. Edge case 33.
pub(crate) async fn users_that_a_device_makes_up_do_not_push_a_verdict_out(database: &Database) {
    database.enroll("A").await;
    database.storage().keep_user_verdict(verdict("jo", "decline", false)).await.unwrap();
    let many = "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 9999) \
        INSERT INTO user_verdicts (device_id, enrollment_id, tenant_id, verdict, is_managed, decided_at) \
        SELECT 'A', 'A:made-up-' || n, 'default', 'decline', 0, 0 FROM numbers";
    database.meddle(many).await;
    assert!(!database.storage().keep_user_verdict(verdict("al", "no-challenge", true)).await.unwrap());
    assert!(database.storage().keep_user_verdict(verdict("jo", "challenge", false)).await.unwrap());
    assert!(refusal(database, "jo", None).await.unwrap().contains("challenge"));
}
