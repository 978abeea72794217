//! Single containers on one host, by the stock client.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use skep_chaos_tests::{LIMIT, Rig, has_docker, take_turn, wait_until};

#[test]
fn the_docker_client_runs_containers() {
    take_turn!();
    let Some(rig) = one_host() else { return };
    let docker = |args: &[&str]| docker(&rig, args);
    let ok = |args: &[&str]| ok(&rig, args);
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
    let Some(rig) = one_host() else { return };
    let host = rig.host(1);
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
fn streams_terminals_and_more_processes_work_by_the_docker_client() {
    take_turn!();
    let Some(rig) = one_host() else { return };
    let ok = |args: &[&str]| ok(&rig, args);
    rig.host(1).import_busybox();
    let host = rig.host(1);
    // Input and output of a container, and of one more process in it.
    assert_eq!(docker_with_input(&rig, &["run", "--rm", "-i", "busybox", "cat"], b"to the end").1, "to the end");
    let terminal = ok(&["run", "--rm", "-t", "busybox", "sh", "-c", "tty; echo $TERM"]);
    assert_eq!(terminal, "/dev/pts/0\r\nxterm\r\n");
    ok(&["run", "-d", "--name", "box", "busybox", "sleep", "1000"]);
    assert_eq!(docker_with_input(&rig, &["exec", "-i", "box", "sh"], b"echo $((6*7))").1, "42\n");
    // A program finds its terminal as large as the client's, from its first look on.
    for program in ["docker", skep_chaos_tests::program().to_str().unwrap()] {
        for asked in ["run --rm -it busybox", "exec -it box"] {
            let asked = format!("stty rows 57 cols 123; {program} -H {} {asked} stty size", host.socket());
            // Its input stays open.
            let line = format!("[ -p input ] || mkfifo input; script -qec '{asked}' /dev/null <> input");
            let told = host.exec("sh", &["-c", &format!("cd {}; {line}", host.dir().display())]);
            assert_eq!(told.stdout.lines().next(), Some("57 123"), "{line}: {told:?}");
        }
    }
    assert_eq!(
        ok(&["exec", "-u", "web", "-w", "/tmp", "-e", "A=b", "box", "sh", "-c", "id -u; pwd; echo $A $HOME"]),
        "1000\n/tmp\nb /home/web\n"
    );
    assert_eq!(docker(&rig, &["exec", "box", "sh", "-c", "echo err >&2; exit 7"]), (7, String::new(), "err\n".into()));
    let (code, _, stderr) = docker(&rig, &["exec", "box", "nothing"]);
    assert!(code == 127 && stderr.contains("executable file not found in $PATH"), "{code} {stderr}");

    // As everywhere, a writer whose reader is gone ends; nothing in between is lost.
    let lines = ok(&["run", "--rm", "busybox", "sh", "-c", "yes some line | head -n 100000"]);
    assert_eq!(lines.lines().count(), 100_000);
    let ignored = ["grep", "SigIgn", "/proc/self/status"];
    for run in [&["run", "--rm", "busybox"][..], &["exec", "box"]] {
        let told = ok(&[run, &ignored].concat());
        let set = u64::from_str_radix(told.trim_start_matches("SigIgn:").trim(), 16).unwrap();
        assert_eq!(set & (1 << (nix::libc::SIGPIPE - 1)), 0, "SIGPIPE is not ignored");
    }

    // The daemon's death takes nothing from one that is attached afterwards, nor from the container.
    ok(&["run", "-d", "-i", "--name", "echo", "busybox", "cat"]);
    host.kill_daemon();
    host.start_daemon();
    let mut client = Command::new("docker");
    client.arg("-H").arg(host.socket()).args(["attach", "echo"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut client = client.spawn().unwrap();
    client.stdin.as_mut().unwrap().write_all(b"still here\n").unwrap();
    let mut line = String::new();
    BufReader::new(client.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "still here\n");
    drop(client.stdin.take());
    client.kill().unwrap();
    client.wait().unwrap();

    ok(&["pause", "box"]);
    assert!(docker(&rig, &["exec", "box", "true"]).2.contains("is paused"));
    ok(&["unpause", "box"]);
    ok(&["rename", "box", "crate"]);
    ok(&["update", "--memory", "64m", "crate"]);
    assert_eq!(ok(&["inspect", "-f", "{{.HostConfig.Memory}}", "crate"]).trim(), "67108864");
    assert!(ok(&["top", "crate"]).contains("sleep 1000"));
    assert!(ok(&["stats", "--no-stream", "crate"]).contains("64MiB"));
    ok(&["rm", "-f", "crate", "echo"]);
}

#[test]
fn skep_itself_runs_containers() {
    take_turn!();
    let Some(rig) = one_host() else { return };
    let host = rig.host(1);
    rig.host(1).import_busybox();
    assert_eq!(host.ok(&["run", "--rm", "-e", "A=b", "busybox", "sh", "-c", "echo $A"]), "b\n");
    assert!(!host.run(&["run", "--rm", "busybox", "false"]).success);
    assert!(host.fails(&["run", "--rm", "busybox", "nonsense"]).contains("not found"));
    host.ok(&["network", "create", "-d", "bridge", "front"]);
    host.ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "--network",
        "front",
        "-v",
        "data:/www",
        "busybox",
        "httpd",
        "-f",
        "-h",
        "/www",
    ]);
    host.ok(&["exec", "web", "sh", "-c", "echo page > /www/index.html"]);
    let page = host.ok(&["run", "--rm", "--network", "front", "busybox", "wget", "-qO-", "http://web/"]);
    assert_eq!(page, "page\n");
    assert!(host.ok(&["inspect", "--format", "{{.State.Status}}", "web"]).contains("running"));
    host.ok(&["stop", "-t", "0", "web"]);
    host.ok(&["rm", "web"]);
    assert!(host.ok(&["volume", "ls"]).contains("data"));
    host.ok(&["volume", "rm", "data"]);
    host.ok(&["network", "rm", "front"]);
}

#[test]
fn restart_policies_act_also_on_what_happened_while_the_daemon_was_away() {
    take_turn!();
    let Some(rig) = one_host() else { return };
    let host = rig.host(1);
    let ok = |args: &[&str]| ok(&rig, args);
    rig.host(1).import_busybox();
    let restarts = |name: &str| ok(&["inspect", "-f", "{{.RestartCount}} {{.State.Status}} {{.State.ExitCode}}", name]);
    ok(&["run", "-d", "--name", "failing", "--restart", "on-failure:2", "busybox", "false"]);
    wait_until("it is given up after two more tries", LIMIT, || {
        let found = restarts("failing");
        (found.trim() == "2 exited 1", found)
    });
    ok(&["run", "-d", "--name", "again", "--restart", "always", "busybox", "sleep", "1000"]);
    ok(&["run", "-d", "--name", "stopped", "--restart", "unless-stopped", "busybox", "sleep", "1000"]);
    ok(&["stop", "-t", "0", "stopped"]);
    // It ends while nobody watches but its shim.
    let pid = ok(&["inspect", "-f", "{{.State.Pid}}", "again"]);
    host.kill_daemon();
    assert!(Command::new("kill").args(["-9", pid.trim()]).status().unwrap().success());
    host.start_daemon();
    wait_until("it runs again", LIMIT, || {
        let found = restarts("again");
        (found.trim() == "1 running 0", found)
    });
    assert!(restarts("stopped").contains("exited"), "what was stopped by hand stays so");
    ok(&["kill", "again"]);
    assert!(restarts("again").contains("exited 137"), "killed by hand is stopped by hand");
    ok(&["rm", "failing", "again", "stopped"]);
}

#[test]
fn images_are_built_saved_loaded_and_their_files_copied() {
    take_turn!();
    let Some(rig) = one_host() else { return };
    let ok = |args: &[&str]| ok(&rig, args);
    rig.host(1).import_busybox();
    let context = tempfile::tempdir().unwrap();
    let dir = context.path();
    for (name, text) in
        [("Dockerfile", DOCKERFILE), (".dockerignore", "*.log\n"), ("kept.txt", "kept"), ("left-out.log", "secret")]
    {
        std::fs::write(dir.join(name), text).unwrap();
    }
    let dir = dir.to_str().unwrap();
    let build = |tag: &str, who: &str| {
        ok(&["build", "-q", "-t", tag, "--build-arg", who, dir]).lines().last().unwrap().to_owned()
    };
    let first = build("story:1", "WHO=bees");
    assert_eq!(ok(&["run", "--rm", "story:1"]), "hello bees\n");
    assert_eq!(ok(&["run", "--rm", "--entrypoint", "ls", "story:1", "/src"]), "Dockerfile\nkept.txt\n");
    assert_eq!(first, build("story:2", "WHO=bees"), "nothing has changed");
    assert_ne!(first, build("story:3", "WHO=ants"), "an argument has");
    std::fs::write(context.path().join("left-out.log"), "other").unwrap();
    assert_eq!(first, build("story:2", "WHO=bees"), "what is left out does not count");
    std::fs::write(context.path().join("kept.txt"), "changed").unwrap();
    assert_ne!(first, build("story:2", "WHO=bees"), "what is copied does");
    std::fs::write(context.path().join("Dockerfile"), "FROM busybox\nRUN exit 3\n").unwrap();
    let (code, _, stderr) = docker(&rig, &["build", "-q", dir]);
    assert!(code == 3 && stderr.contains("returned a non-zero code: 3"), "{code} {stderr}");

    let archive = context.path().join("saved.tar");
    let archive = archive.to_str().unwrap();
    ok(&["save", "-o", archive, "story:1"]);
    let names = Command::new("tar").args(["-xOf", archive, "repositories"]).output().unwrap().stdout;
    assert!(String::from_utf8_lossy(&names).starts_with(r#"{"story":{"1":""#), "as older programs look for it");
    ok(&["rmi", "story:1", "story:2", "story:3"]);
    assert!(ok(&["load", "-i", archive]).contains("story:1"));
    assert_eq!(ok(&["inspect", "-f", "{{.Id}}", "story:1"]).trim(), first, "it is the same, bit for bit");
    assert_eq!(ok(&["run", "--rm", "story:1"]), "hello bees\n");

    // Files go in and out, running or not; what changed is told, and can be kept.
    let kept = context.path().join("kept.txt");
    ok(&["create", "--name", "files", "busybox", "sleep", "1000"]);
    ok(&["cp", kept.to_str().unwrap(), "files:/tmp/"]);
    ok(&["start", "files"]);
    assert_eq!(ok(&["exec", "files", "cat", "/tmp/kept.txt"]), "changed");
    ok(&["exec", "files", "sh", "-c", "rm /etc/group; echo new > /new; ln -s /../../../../etc/shadow /trap"]);
    assert_eq!(ok(&["diff", "files"]), "C /etc\nD /etc/group\nA /new\nC /tmp\nA /tmp/kept.txt\nA /trap\n");
    let out = context.path().join("out");
    let (code, _, _) = docker(&rig, &["cp", "-L", "files:/trap", out.to_str().unwrap()]);
    assert_ne!(code, 0, "a link that leads out of the container leads nowhere");
    ok(&["cp", "files:/new", out.to_str().unwrap()]);
    assert_eq!(std::fs::read_to_string(out).unwrap(), "new\n");
    ok(&["commit", "-c", "CMD [\"cat\", \"/new\"]", "files", "kept:1"]);
    assert_eq!(ok(&["run", "--rm", "kept:1"]), "new\n");
    ok(&["rm", "-f", "files"]);
}

#[test]
fn a_full_disk_loses_no_exit_code_and_leaves_nothing_half_made() {
    take_turn!();
    if !has_docker() {
        return;
    }
    let rig = Rig::new(1);
    let host = rig.host(1);
    // Of the host's own namespace, and gone with it.
    std::fs::create_dir_all(host.data()).unwrap();
    assert!(host.exec("mount", &["-t", "tmpfs", "-o", "size=24m", "tmpfs", host.data().to_str().unwrap()]).success);
    host.start_daemon();
    let ok = |args: &[&str]| ok(&rig, args);
    rig.host(1).import_busybox();
    let fill = "dd if=/dev/zero of=/fill bs=1M count=100; exit 7";
    assert_eq!(docker(&rig, &["run", "--name", "filler", "busybox", "sh", "-c", fill]).0, 7);
    let (code, _, stderr) = docker(&rig, &["run", "-d", "--name", "late", "busybox", "sleep", "1000"]);
    assert!(code == 125 && stderr.contains("No space left"), "{code} {stderr}");
    assert!(!ok(&["ps", "-a"]).contains("late"));
    let (_, _, stderr) = docker_with_input(&rig, &["import", "-", "more"], &vec![1; 4 << 20]);
    assert!(stderr.contains("cannot be imported"), "{stderr}");
    ok(&["rm", "filler"]);
    // One that runs while the disk fills can still be held, let go and stopped.
    ok(&["run", "-d", "--name", "live", "busybox", "sleep", "1000"]);
    assert_eq!(docker(&rig, &["exec", "live", "sh", "-c", fill]).0, 7);
    ok(&["pause", "live"]);
    ok(&["unpause", "live"]);
    ok(&["stop", "-t", "0", "live"]);
    assert_eq!(ok(&["wait", "live"]).trim(), "137");
    ok(&["rm", "live"]);
    assert_eq!(ok(&["run", "--rm", "busybox", "echo", "room again"]), "room again\n");
}

#[test]
fn a_build_that_is_cut_off_leaves_nothing() {
    take_turn!();
    let Some(rig) = one_host() else { return };
    let host = rig.host(1);
    let ok = |args: &[&str]| ok(&rig, args);
    rig.host(1).import_busybox();
    let context = tempfile::tempdir().unwrap();
    std::fs::write(context.path().join("Dockerfile"), "FROM busybox\nRUN touch /made\nRUN sleep 1000\n").unwrap();
    let mut client = Command::new("docker");
    client.env("DOCKER_BUILDKIT", "0").arg("-H").arg(host.socket()).arg("build").arg(context.path());
    let mut client = client.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("the long step runs", LIMIT, || {
        let list = ok(&["ps", "--no-trunc"]);
        (list.contains("sleep 1000"), list)
    });
    host.kill_daemon();
    client.wait().unwrap();
    host.start_daemon();
    wait_until("its container is gone", LIMIT, || {
        let list = ok(&["ps", "-a"]);
        (list.lines().count() == 1, list)
    });
    assert!(!host.data().join("tmp").exists());
    let mounts = host.exec("cat", &["/proc/mounts"]).stdout;
    assert!(!mounts.contains("incoming"), "{mounts}");
    let layers = || std::fs::read_dir(host.data().join("image/layers")).unwrap().count();
    wait_until("busybox's layer alone is left", LIMIT, || (layers() == 1, layers().to_string()));
}

const DOCKERFILE: &str = r#"
FROM busybox AS made
ARG WHO=world
WORKDIR /src
COPY . .
RUN echo "hello $WHO" > /greeting

FROM busybox
COPY --from=made /greeting /greeting
COPY --from=made /src /src
CMD ["cat", "/greeting"]
"#;

#[test]
fn volumes_hold_data_and_what_is_not_possible_is_refused_by_name() {
    take_turn!();
    let Some(rig) = one_host() else { return };
    let ok = |args: &[&str]| ok(&rig, args);
    rig.host(1).import_busybox();
    ok(&["volume", "create", "--label", "team=a", "data"]);
    ok(&["run", "--rm", "-v", "data:/data", "busybox", "sh", "-c", "echo kept > /data/file"]);
    assert_eq!(ok(&["run", "--rm", "-v", "data:/other:ro", "busybox", "cat", "/other/file"]), "kept\n");
    assert!(ok(&["run", "--rm", "-v", "from-image:/etc", "busybox", "ls", "/etc"]).contains("passwd"));
    ok(&["run", "--name", "user", "-v", "/nameless", "-v", "data:/data", "busybox", "true"]);
    let (code, _, stderr) = docker(&rig, &["volume", "rm", "data"]);
    assert!(code != 0 && stderr.contains("in use"), "{stderr}");
    assert_eq!(ok(&["volume", "ls", "-q"]).lines().count(), 3);
    ok(&["rm", "-v", "user"]);
    assert_eq!(ok(&["volume", "ls", "-q"]), "data\nfrom-image\n");
    ok(&["volume", "rm", "data", "from-image"]);
    for (args, why) in [
        (vec!["run", "--rm", "--gpus", "all", "busybox"], "--gpus"),
        (vec!["run", "-d", "--restart", "sometimes", "busybox"], "sometimes"),
        (vec!["run", "-m", "1m", "busybox"], "6MB"),
        (vec!["run", "--mount", "type=bind,src=/not/there,dst=/x", "busybox"], "/not/there"),
        (vec!["run", "--rm", "--security-opt", "apparmor=mine", "busybox", "true"], "AppArmor"),
        (vec!["volume", "create", "-d", "nfs", "x1"], "nfs"),
        (vec!["volume", "create", "../up"], "../up"),
    ] {
        let (code, _, stderr) = docker(&rig, &args);
        assert!(code != 0 && stderr.contains(why), "{args:?}: {code} {stderr}");
    }
    assert_eq!(ok(&["ps", "-a", "-q"]), "");
}

#[test]
fn networks_of_one_host_have_names_and_keep_apart() {
    take_turn!();
    let Some(rig) = one_host() else { return };
    let host = rig.host(1);
    let ok = |args: &[&str]| ok(&rig, args);
    rig.host(1).import_busybox();
    let reaches = |from: &str, to: &str| docker(&rig, &["exec", from, "ping", "-c", "1", "-W", "1", to]).0 == 0;
    ok(&["network", "create", "front"]);
    ok(&["network", "create", "--subnet", "10.50.0.0/24", "--gateway", "10.50.0.254", "back"]);
    ok(&["network", "create", "--internal", "cellar"]);
    ok(&["run", "-d", "--name", "web", "--network", "front", "--network-alias", "www", "busybox", "sleep", "1000"]);
    ok(&["run", "-d", "--name", "client", "--network", "front", "busybox", "sleep", "1000"]);
    ok(&["run", "-d", "--name", "db", "--network", "back", "--ip", "10.50.0.77", "busybox", "sleep", "1000"]);
    assert!(reaches("client", "web") && reaches("client", "www"));
    assert!(!reaches("client", "db") && !reaches("client", "10.50.0.77"), "another network");
    ok(&["network", "connect", "--alias", "frontend", "back", "client"]);
    assert!(reaches("client", "db") && reaches("db", "frontend"));

    // The daemon's death takes no packet; names come back with it.
    host.kill_daemon();
    host.start_daemon();
    wait_until("names are served again", LIMIT, || (reaches("client", "web") && reaches("db", "frontend"), host.log()));
    ok(&["rename", "web", "renamed"]);
    assert!(reaches("client", "renamed") && !reaches("client", "web"));
    let (code, _, stderr) = docker(&rig, &["network", "rm", "back"]);
    assert!(code != 0 && stderr.contains("active endpoints"), "{stderr}");
    ok(&["network", "disconnect", "back", "client"]);
    assert!(!reaches("client", "db") && reaches("client", "renamed"));

    // A port on one address is served there and nowhere else; nothing leads out of an internal network.
    ok(&[
        "run",
        "-d",
        "--name",
        "page",
        "--network",
        "front",
        "-p",
        "127.0.0.1:8088:80",
        "busybox",
        "httpd",
        "-f",
        "-h",
        "/etc",
    ]);
    let answers = |address: &str| {
        host.exec("curl", &["-s", "-m", "2", &format!("http://{address}:8088/passwd")]).stdout.contains("root")
    };
    wait_until("the page is served", LIMIT, || (answers("127.0.0.1"), host.log()));
    assert!(!answers(host.addr()), "another address");
    assert_eq!(ok(&["port", "page"]), "80/tcp -> 127.0.0.1:8088\n");
    let routes = ok(&["run", "--rm", "--network", "cellar", "busybox", "ip", "route"]);
    assert!(!routes.contains("default"), "{routes}");
    for (args, why) in [
        (vec!["network", "create", "--subnet", "10.50.0.0/16", "wide"], "overlaps"),
        (vec!["network", "create", "back"], "already exists"),
        (vec!["network", "create", "-d", "ipvlan", "flat"], "macvlan"),
        (vec!["network", "rm", "bridge"], "pre-defined"),
        (vec!["run", "--network", "back", "--ip", "10.50.0.77", "busybox", "true"], "in use"),
        (vec!["run", "--network", "nowhere", "busybox"], "not found"),
    ] {
        let (code, _, stderr) = docker(&rig, &args);
        assert!(code != 0 && stderr.contains(why), "{args:?}: {code} {stderr}");
    }
    ok(&["rm", "-f", "renamed", "client", "db", "page"]);
    ok(&["container", "prune", "-f"]);
    assert_eq!(ok(&["network", "prune", "-f"]).matches('\n').count(), 5, "three networks are gone");
    let links = host.exec("ip", &["-o", "link"]).stdout;
    assert!(!links.contains("br-") && !links.contains("veth"), "{links}");
}

#[test]
fn neighbours_are_kept_apart_where_a_network_says_so() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    host.import_busybox();
    let option = "com.docker.network.bridge.enable_icc=false";
    host.ok(&["network", "create", "-d", "bridge", "-o", option, "apart"]);
    host.ok(&["network", "create", "-d", "bridge", "together"]);
    for network in ["apart", "together"] {
        let address = |name: &str| {
            host.ok(&["run", "-d", "--name", name, "--network", network, "busybox", "sleep", "1000"]);
            let template = format!("{{{{.NetworkSettings.Networks.{network}.IPAddress}}}}");
            host.ok(&["inspect", "-f", &template, name]).trim().to_owned()
        };
        let (_, second) = (address("first"), address("second"));
        let reached = host.run(&["exec", "first", "ping", "-c", "1", "-W", "1", &second]).success;
        assert_eq!(reached, network == "together", "{network}");
        let gateway = second.rsplit_once('.').unwrap().0.to_owned() + ".1";
        assert!(host.run(&["exec", "first", "ping", "-c", "1", "-W", "2", &gateway]).success, "{network}");
        host.ok(&["rm", "-f", "first", "second"]);
    }
    host.ok(&["network", "rm", "apart", "together"]);
}

/// What neighbours remember of the host stays true: nothing that they send goes nowhere.
#[test]
fn the_host_has_one_address_on_a_network_whoever_comes_and_goes() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    host.import_busybox();
    host.ok(&[
        "network",
        "create",
        "-d",
        "bridge",
        "--subnet",
        "10.68.0.0/24",
        "-o",
        "com.docker.network.bridge.name=br-one",
        "one",
    ]);
    let link = || {
        let told = host.exec("ip", &["-br", "link", "show", "br-one"]).stdout;
        told.split_whitespace().nth(2).unwrap_or_default().to_owned()
    };
    let beginning = [&["run", "-d", "--network", "one"][..], &["--name"]].concat();
    let run = |name: &str| host.ok(&[&beginning[..], &[name, "busybox", "sleep", "1000"]].concat());
    run("stays");
    let first = link();
    assert_eq!(first, "02:42:0a:44:00:01");
    // Each link's own address is made up by the kernel: some are lower, some higher.
    let names = ["c1", "c2", "c3", "c4", "c5", "c6", "c7", "c8"];
    for name in names {
        run(name);
        assert_eq!(link(), first);
    }
    host.kill_daemon();
    host.start_daemon();
    for name in names {
        host.ok(&["rm", "-f", name]);
        assert_eq!(link(), first);
        host.ok(&["exec", "stays", "ping", "-c", "1", "-W", "2", "10.68.0.1"]);
    }
    host.ok(&["rm", "-f", "stays"]);
    host.ok(&["network", "rm", "one"]);
}

fn ok(rig: &Rig, args: &[&str]) -> String {
    let (code, stdout, stderr) = docker(rig, args);
    assert_eq!(code, 0, "docker {args:?}: {stderr}");
    stdout
}

/// As [`docker`], with something to read.
fn docker_with_input(rig: &Rig, args: &[&str], input: &[u8]) -> (i32, String, String) {
    let mut client = Command::new("docker");
    client.arg("-H").arg(rig.host(1).socket()).args(args);
    let mut client = client.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    client.stdin.take().unwrap().write_all(input).unwrap();
    told(&client.wait_with_output().unwrap())
}

fn told(output: &std::process::Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// The stock client's exit code, output and errors.
fn docker(rig: &Rig, args: &[&str]) -> (i32, String, String) {
    let mut client = Command::new("docker");
    // The classic builder: what the client falls back to, without its advice.
    client.env("DOCKER_BUILDKIT", "0").arg("-H").arg(rig.host(1).socket()).args(args);
    told(&client.output().unwrap())
}

/// A host with its daemon; `None` where there is no docker client to ask it with.
fn one_host() -> Option<Rig> {
    if !has_docker() {
        return None;
    }
    let rig = Rig::new(1);
    rig.host(1).start_daemon();
    Some(rig)
}
