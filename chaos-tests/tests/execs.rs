//! Further processes in containers that run.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::time::Duration;

use serde_json::json;
use skep_chaos_tests::{LIMIT, Rig, take_turn, wait_until};

/// A daemon that is killed takes no exec with it, and the next one knows how each ended.
#[test]
fn execs_outlive_the_daemon_and_their_ends_are_known() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    host.import_busybox();
    host.ok(&["run", "-d", "--name", "box", "busybox", "sleep", "1000"]);
    let start = |command: &str| {
        let api = &mut host.api();
        let wanted = json!({ "Cmd": ["sh", "-c", command], "AttachStdout": true });
        let made = api.post("/containers/box/exec", &wanted).unwrap().body;
        let id = made["Id"].as_str().unwrap().to_owned();
        assert_eq!(api.post(&format!("/exec/{id}/start"), &json!({ "Detach": true })).unwrap().status, 200);
        id
    };
    let (early, late) = (start("sleep 1; exit 7"), start("while [ ! -e /go ]; do sleep 0.1; done; exit 8"));
    host.kill_daemon();
    std::thread::sleep(Duration::from_secs(2));
    host.start_daemon();
    let look = |id: &str| host.api().get(&format!("/exec/{id}/json")).unwrap().body;
    wait_until("the end while there was no daemon is known", LIMIT, || {
        let exec = look(&early);
        (exec["Running"] == false && exec["ExitCode"] == 7, exec.to_string())
    });
    let running = look(&late);
    assert!(running["Running"] == true && running["ProcessConfig"]["entrypoint"] == "sh", "{running}");
    host.ok(&["exec", "box", "touch", "/go"]);
    wait_until("the end under the next daemon is known", LIMIT, || {
        let exec = look(&late);
        (exec["Running"] == false && exec["ExitCode"] == 8, exec.to_string())
    });
    host.ok(&["rm", "-f", "box"]);
}
