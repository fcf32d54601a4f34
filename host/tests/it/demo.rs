//! The first command of the README.

use std::process::Command;

#[test]
fn the_demo_shows_the_main_job_through_to_the_swapped_plugin() {
    let output = Command::new(env!("CARGO_BIN_EXE_wasmdm")).args(["demo", "--devices", "6"]).output().unwrap();
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{out}{}", String::from_utf8_lossy(&output.stderr));
    for told in [
        "was refused at Authenticate: 403",
        "4 devices are enrolled",
        "DeviceConfigured Acknowledged",
        "the room heard:",
        "is enrolled now",
        "polls were answered meanwhile, 0 failed",
        "it wakes devices through a push service at localhost:",
        "answered 200 OK: queued, and pushed as ",
        "the push service woke DEMO0004, whose push magic it carried",
        "answered SecurityInfo: Acknowledged",
    ] {
        assert!(out.contains(told), "{told}: {out}");
    }
}
