//! Services whose tasks run to their end.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::time::Duration;

use skep_chaos_tests::{LIMIT, Rig, has_docker, take_turn, wait_until};

#[test]
fn jobs_run_to_their_end_once_for_each_update_and_survive_their_managers() {
    take_turn!();
    let rig = Rig::swarm(2, 1);
    let host = rig.host(1);
    for host in rig.hosts() {
        host.import_busybox();
    }
    let job = |name: &str, mode: &[&str], script: &str| {
        let flags = [&["service", "create", "--no-resolve-image", "--name", name, "--mode"], mode].concat();
        [&flags[..], &["busybox", "sh", "-c", script]].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let ok = |args: Vec<String>| host.ok(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let runs = |name: &str| host.ok(&["service", "logs", "--raw", name]).matches("ran").count();

    let six = ["replicated-job", "--replicas", "6", "--max-concurrent", "2"];
    let done = ok(job("six", &six, "echo ran"));
    assert!(done.contains("job complete"), "{done}");
    assert!(host.ok(&["service", "ls"]).contains("0/2 (6/6 completed)"));
    assert_eq!(runs("six"), 6);
    assert_eq!(host.ok(&["service", "ps", "six"]).matches("Complete ").count(), 12, "desired and reached");
    let done = ok(job("each", &["global-job"], "echo ran"));
    assert!(done.contains("job complete") && host.ok(&["service", "ls"]).contains("0/0 (2/2 completed)"), "{done}");

    // What fails is tried again, unless it is not to be.
    let script = "test -e /data/1 && echo ran || { touch /data/1; exit 3; }";
    let mount = ["replicated-job", "--mount", "type=volume,source=tried,target=/data", "--restart-delay", "100ms"];
    ok(job("twice", &[&mount[..], &["--constraint", "node.role==manager"]].concat(), script));
    assert_eq!(runs("twice"), 1);
    let once = job("once", &["replicated-job", "--restart-condition", "none"], "exit 3");
    let failed = host.fails(&once.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(failed.contains("not tried again") && failed.contains("non-zero exit (3)"), "{failed}");

    // An update is another run; a manager that comes back begins none.
    host.ok(&["service", "update", "--force", "six"]);
    host.kill_daemon();
    host.start_daemon();
    wait_until("the manager leads again", LIMIT, || {
        let list = host.run(&["service", "ls"]).stdout;
        (list.contains("0/2 (6/6 completed)"), list)
    });
    // As long as a look of the new leader may take.
    std::thread::sleep(Duration::from_secs(2));
    let index = host.ok(&["service", "inspect", "-f", "{{.JobStatus.JobIteration.Index}}", "six"]);
    assert_eq!((index.trim(), runs("six"), runs("each")), ("1", 6, 2));
    host.ok(&["service", "scale", "six=7"]);
    assert_eq!(runs("six"), 7);
    host.ok(&["service", "update", "-d", "--max-concurrent", "4", "six"]);
    host.await_replicas("six", "0/4 (7/7 completed)");
    host.ok(&["service", "update", "-d", "--max-concurrent", "2", "six"]);
    host.await_replicas("six", "0/2 (7/7 completed)");
    if has_docker() {
        let done = host.docker(&["service", "update", "--force", "six"]);
        assert!(done.contains("job complete"), "{done}");
        assert!(host.docker(&["service", "ls", "--filter", "mode=replicated-job"]).contains("0/2 (7/7 completed)"));
        let eight = ["--mode", "replicated-job", "--replicas", "8", "--max-concurrent", "3", "--no-resolve-image"];
        let done = host.docker(&[&["service", "create", "--name", "eight"], &eight[..], &["busybox", "true"]].concat());
        assert!(done.contains("job complete"), "{done}");
    }
}
