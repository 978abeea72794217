//! Single containers on one host, by the stock client.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::process::Command;

use skep_chaos_tests::{LIMIT, Rig, take_turn, wait_until};

#[test]
fn the_docker_client_runs_containers() {
    take_turn!();
    if no_docker() {
        return;
    }
    let rig = Rig::new(1);
    rig.host(1).start_daemon();
    let docker = |args: &[&str]| docker(&rig, args);
    let ok = |args: &[&str]| {
        let (code, stdout, stderr) = docker(args);
        assert_eq!(code, 0, "docker {args:?}: {stderr}");
        stdout
    };
    // In the foreground: its output, its exit code, and nothing left.
    let (code, stdout, stderr) = docker(&["run", "--rm", "skep/whoami", "nonsense"]);
    assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
    assert!(stderr.contains("\"nonsense\" is unknown"), "{stderr}");
    let (code, _, stderr) = docker(&["run", "--rm", "--entrypoint", "/nothing", "skep/whoami"]);
    assert_eq!(code, 127, "{stderr}");
    wait_until("nothing is left", LIMIT, || {
        let list = ok(&["ps", "-a", "-q"]);
        (list.is_empty(), list)
    });

    // In the background, with a port, a limit and a variable.
    let id = ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "-p",
        "8080:8000",
        "-e",
        "COLOUR=blue",
        "-m",
        "64m",
        "--label",
        "team=a",
        "--add-host",
        "db:10.9.9.9",
        "skep/whoami",
    ]);
    wait_until("it answers", LIMIT, || {
        let answer = rig.host(1).exec("curl", &["-s", "-m", "2", "http://127.0.0.1:8080/"]).stdout;
        (answer.contains("COLOUR=blue"), answer)
    });
    assert_eq!(ok(&["ps", "-q", "--no-trunc", "--filter", "label=team=a"]), id);
    assert_eq!(ok(&["inspect", "-f", "{{.State.Running}} {{.HostConfig.Memory}}", "web"]).trim(), "true 67108864");
    assert!(ok(&["logs", "web"]).contains("whoami listens on port 8000"));
    let (code, _, stderr) = docker(&["run", "-d", "--name", "web", "skep/whoami"]);
    assert!(code == 125 && stderr.contains("in use"), "{code} {stderr}");
    ok(&["restart", "-t", "2", "web"]);
    ok(&["stop", "-t", "2", "web"]);
    assert_eq!(ok(&["wait", "web"]).trim(), "0");
    ok(&["start", "web"]);
    ok(&["kill", "web"]);
    assert_eq!(ok(&["wait", "web"]).trim(), "137");
    ok(&["rm", "web"]);
}

#[test]
fn a_client_that_was_killed_is_let_go_of_though_the_container_is_quiet() {
    take_turn!();
    if no_docker() {
        return;
    }
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    let (code, _, stderr) = docker(&rig, &["run", "-d", "--name", "web", "skep/whoami"]);
    assert_eq!(code, 0, "{stderr}");
    // The kernel counts them where the client is.
    let socket = host.socket();
    let path = socket.trim_start_matches("unix://");
    let list = || String::from_utf8(Command::new("ss").arg("-xH").output().unwrap().stdout).unwrap();
    let connections = || list().lines().filter(|line| line.contains(path)).count();
    let mut client = Command::new("docker").arg("-H").arg(host.socket()).args(["attach", "web"]).spawn().unwrap();
    wait_until("the client is attached", LIMIT, || (connections() > 0, list()));
    // Longer than the daemon waits before it asks: the client takes no harm by that.
    std::thread::sleep(std::time::Duration::from_secs(6));
    assert!(client.try_wait().unwrap().is_none(), "the client is still there");
    client.kill().unwrap();
    client.wait().unwrap();
    wait_until("its connections are closed", LIMIT, || (connections() == 0, list()));
    assert_eq!(docker(&rig, &["rm", "-f", "web"]).0, 0);
}

#[test]
fn what_is_not_there_yet_is_refused_by_name() {
    take_turn!();
    if no_docker() {
        return;
    }
    let rig = Rig::new(1);
    rig.host(1).start_daemon();
    for (args, why) in [
        (vec!["run", "--rm", "-t", "skep/whoami"], "--tty"),
        (vec!["run", "--rm", "--privileged", "skep/whoami"], "--privileged"),
        (vec!["run", "-d", "--restart", "always", "skep/whoami"], "--restart is"),
        (vec!["run", "--rm", "-v", "/data", "skep/whoami"], "anonymous volume"),
        (vec!["run", "--rm", "--cpu-quota", "5000", "skep/whoami"], "use --cpus"),
        (vec!["run", "--rm", "-p", "127.0.0.1:80:80", "skep/whoami"], "127.0.0.1 alone"),
    ] {
        let (code, _, stderr) = docker(&rig, &args);
        assert!(code == 125 && stderr.contains(why), "{args:?}: {code} {stderr}");
    }
    assert_eq!(docker(&rig, &["ps", "-a", "-q"]).1, "");
}

/// The stock client's exit code, output and errors.
fn docker(rig: &Rig, args: &[&str]) -> (i32, String, String) {
    let output = Command::new("docker").arg("-H").arg(rig.host(1).socket()).args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

fn no_docker() -> bool {
    let missing = Command::new("docker").arg("--version").output().is_err();
    if missing {
        eprintln!("SKIPPED: there is no docker client on the PATH");
    }
    missing
}
