use crate::fixture::*;
use wasmdm_storage::audit::AuditRow;
use wasmdm_storage::effects::Applied;

fn row(action: &str) -> AuditRow {
    AuditRow {
        tenant: default(),
        actor: "plugin:p".to_owned(),
        action: action.to_owned(),
        target: Some(id("nobody")),
        detail: serde_json::json!({ "reason": "not listed" }),
        at: at(5),
    }
}

pub(crate) async fn decisions_leave_rows_newest_first(database: &Database) {
    let storage = database.storage();
    assert_eq!(storage.record_decision(vec![], vec![row("first"), row("second")], at(5)).await.unwrap(), Applied::Done(()));
    let mut stale = effects("p");
    stale.reads = vec![("k".to_owned(), Some("v".to_owned()))];
    let conflict = storage.record_decision(vec![required(stale)], vec![row("never")], at(6)).await.unwrap();
    assert!(matches!(conflict, Applied::Conflict(_)));
    let rows = storage.audit(&default(), 10).await.unwrap();
    assert_eq!(rows.iter().map(|row| row.action.as_str()).collect::<Vec<_>>(), ["second", "first"]);
    assert_eq!(rows[0].detail["reason"], "not listed");
    assert_eq!(rows[0].target, Some(id("nobody")));
    assert_eq!(storage.audit(&default(), 1).await.unwrap().len(), 1);
}
