//! Volumes that show something of the host's.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use skep_chaos_tests::{Rig, take_turn};

/// Users of it come and go, and the daemon dies: a directory that a volume shows is as it was when the volume is gone.
#[test]
fn a_directory_that_a_volume_shows_outlives_it() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.own_etc();
    host.start_daemon();
    host.import_busybox();
    // On the same file system as the daemon's data.
    let shown = host.dir().join("shown");
    std::fs::create_dir(&shown).unwrap();
    std::fs::write(shown.join("mine"), "mine").unwrap();
    let device = format!("device={}", shown.display());
    for flags in [&[][..], &["--userns-remap", "default"]] {
        host.stop_daemon();
        host.start_daemon_with(flags);
        host.ok(&["volume", "create", "-o", "type=none", "-o", "o=bind", "-o", &device, "show"]);
        for name in ["one", "two"] {
            host.ok(&["run", "-d", "--name", name, "-v", "show:/show", "busybox", "sleep", "1000"]);
        }
        assert_eq!(host.ok(&["run", "--rm", "-v", "show:/show", "busybox", "cat", "/show/mine"]), "mine");
        host.kill_daemon();
        host.start_daemon_with(flags);
        host.ok(&["restart", "-t", "0", "one", "two"]);
        assert!(!host.run(&["run", "--rm", "-v", "show:/show", "busybox", "nonsense"]).success);
        assert_eq!(host.ok(&["exec", "two", "cat", "/show/mine"]), "mine");
        let mounts = host.exec("cat", &["/proc/self/mountinfo"]).stdout;
        assert_eq!(mounts.matches("/volumes/show/_data ").count(), 1, "{mounts}");
        host.ok(&["rm", "-f", "one", "two"]);
        host.ok(&["volume", "rm", "show"]);
        assert_eq!(std::fs::read_to_string(shown.join("mine")).unwrap(), "mine", "{flags:?}");
        let mounts = host.exec("cat", &["/proc/self/mountinfo"]).stdout;
        assert!(!mounts.contains("/shown "), "{mounts}");
    }
}
