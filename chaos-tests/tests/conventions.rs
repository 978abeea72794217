//! What users and their scripts take for granted of a single host, beyond what any one command's help says. Found by
//! running the test suites of Docker's own clients against the daemon.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::process::Command;

use skep_chaos_tests::{Host, LIMIT, Rig, has_docker, take_turn, wait_until};

fn run(host: &Host, args: &[&str]) -> String {
    host.docker(&[&["run", "--rm"], args].concat())
}

#[test]
fn links_lead_to_containers_by_names_of_ones_own() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    // The default network serves no names: hosts, and the environment.
    let database = ["run", "-d", "--name", "db", "--expose", "5432", "-e", "OWNER=bee", "busybox", "sleep", "600"];
    host.docker(&database);
    let told = run(host, &["--name", "web", "--link", "db:my-db", "busybox", "sh", "-c", "cat /etc/hosts; env"]);
    let address = host.docker(&["inspect", "-f", "{{.NetworkSettings.IPAddress}}", "db"]).trim().to_owned();
    for want in [
        format!("{address}\tmy-db "),
        format!("MY_DB_PORT_5432_TCP=tcp://{address}:5432"),
        "MY_DB_ENV_OWNER=bee".into(),
        "MY_DB_NAME=/web/my-db".into(),
    ] {
        assert!(told.contains(&want), "{want} is not in {told}");
    }
    host.docker(&["run", "-d", "--name", "app", "--link", "db", "busybox", "sleep", "600"]);
    assert_eq!(host.docker(&["inspect", "-f", "{{.HostConfig.Links}}", "app"]).trim(), "[/db:/app/db]");
    assert!(host.docker(&["ps", "--format", "{{.Names}}", "--no-trunc"]).contains("app/db"));
    // It is found at its new place, too.
    host.docker(&["stop", "-t", "0", "db"]);
    let first = ["run", "-d", "--name", "first", "busybox", "sleep", "600"];
    host.docker(&first);
    host.docker(&["start", "db"]);
    let moved = host.docker(&["inspect", "-f", "{{.NetworkSettings.IPAddress}}", "db"]).trim().to_owned();
    assert_ne!(moved, address, "another container has its address");
    assert!(host.docker(&["exec", "app", "cat", "/etc/hosts"]).contains(&format!("{moved}\tdb")));
    host.docker(&["stop", "-t", "0", "db"]);
    assert!(
        host.docker_fails(&["run", "--rm", "--link", "db", "busybox", "true"]).contains("non running container: /db")
    );
    assert!(
        host.docker_fails(&["run", "--link", "nobody:n", "busybox", "true"])
            .contains("could not get container for nobody")
    );
    host.docker(&["rm", "--link", "/app/db"]);
    assert_eq!(host.docker(&["inspect", "-f", "{{json .HostConfig.Links}}", "app"]).trim(), "null");

    // In others a link is a name that one container alone has, whenever the other comes.
    host.docker(&["network", "create", "front"]);
    let linked = ["run", "-d", "--name", "reader", "--net", "front", "--link", "late:store", "busybox", "sleep", "600"];
    host.docker(&linked);
    host.docker(&["run", "-d", "--name", "late", "--net", "front", "busybox", "sleep", "600"]);
    let late = "{{(index .NetworkSettings.Networks \"front\").IPAddress}}";
    let late = host.docker(&["inspect", "-f", late, "late"]).trim().to_owned();
    assert!(host.look_up("reader", "store").contains(&late));
    assert!(host.look_up("late", "store").is_empty());
    // A name of a network may stand behind another.
    assert!(host.look_up("reader", "late.front").contains(&late));
    host.docker(&["swarm", "init", "--advertise-addr", host.addr()]);
    host.docker(&["network", "create", "-d", "overlay", "--attachable", "wide"]);
    let wide = ["run", "--rm", "--net", "wide", "--link", "late:store", "busybox", "true"];
    assert!(host.docker_fails(&wide).contains("links in networks of the swarm are not supported"));
    host.kill_daemon();
    host.start_daemon();
    wait_until("links are served again", LIMIT, || {
        let found = host.look_up("reader", "store");
        (found.contains(&late), format!("{found:?}"))
    });
}

#[test]
fn a_container_begins_where_and_as_it_is_told_to() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    // A directory that is not there is made, also within a volume.
    assert_eq!(run(host, &["-w", "/not/there/yet", "busybox", "pwd"]).trim(), "/not/there/yet");
    assert_eq!(run(host, &["-v", "data:/data", "-w", "/data/below", "busybox", "pwd"]).trim(), "/data/below");
    // Not where nothing is to be written.
    host.docker_fails(&["run", "--rm", "-v", "data:/data:ro", "-w", "/data/kept/out", "busybox", "true"]);
    assert!(!run(host, &["-v", "data:/data", "busybox", "ls", "/data"]).contains("kept"));
    assert!(host.docker_fails(&["run", "--rm", "-w", "/bin/busybox", "busybox", "true"]).contains("/bin/busybox"));
    // An entrypoint is taken away by an empty one; a variable by its name alone.
    host.import("entered", &["ENTRYPOINT [\"echo\",\"entered\"]", "CMD [\"image\"]", "ENV COLOUR=red"], |_| {});
    assert_eq!(run(host, &["entered"]).trim(), "entered image");
    assert_eq!(run(host, &["--entrypoint", "", "entered", "echo", "plain"]).trim(), "plain");
    assert!(host.docker_fails(&["run", "--rm", "--entrypoint", "", "entered"]).contains("no command specified"));
    let env = run(host, &["-e", "COLOUR", "-e", "HOSTNAME", "--entrypoint", "env", "entered"]);
    assert!(!env.contains("COLOUR") && !env.contains("HOSTNAME"), "{env}");
    // Names: of its own, the host's, or those of whose network it is in.
    let hosts =
        run(host, &["-h", "bee.hive.example", "--add-host", "home:host-gateway", "busybox", "cat", "/etc/hosts"]);
    assert!(hosts.contains("bee.hive.example bee") && hosts.contains("\thome"), "{hosts}");
    let gateway = hosts.lines().find(|line| line.ends_with("\thome")).unwrap().split('\t').next().unwrap();
    assert!(gateway.parse::<std::net::Ipv4Addr>().is_ok(), "{gateway} is the host's address");
    host.docker(&["run", "-d", "--name", "other", "-h", "others", "busybox", "sleep", "600"]);
    let shared = run(host, &["--net", "container:other", "busybox", "sh", "-c", "cat /etc/hosts; hostname"]);
    assert!(shared.trim().ends_with("others") && shared.contains("\tothers"), "{shared}");
    // Ports below 1024 and echo requests are for everybody in a network of his own.
    let ports = ["-u", "1000", "busybox", "cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start"];
    assert_eq!(run(host, &ports).trim(), "0");
    let range = ["busybox", "cat", "/proc/sys/net/ipv4/ping_group_range"];
    assert_eq!(run(host, &range).split_whitespace().collect::<Vec<_>>(), ["0", "2147483647"]);
    let own = ["--sysctl", "net.ipv4.ip_unprivileged_port_start=80"];
    assert_eq!(run(host, &[&own, &ports[..]].concat()).trim(), "80");
    // What is no program is told from what is not there.
    assert!(host.docker_fails(&["run", "--rm", "busybox", "/etc"]).starts_with("126"));
    assert!(host.docker_fails(&["run", "--rm", "busybox", "nothing"]).starts_with("127"));
}

#[test]
fn memory_is_shared_with_those_who_join_the_namespace_and_no_others() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    host.docker(&["run", "-d", "--name", "open", "--ipc", "shareable", "--shm-size", "1m", "busybox", "sleep", "600"]);
    host.docker(&["run", "-d", "--name", "closed", "busybox", "sleep", "600"]);
    host.docker(&["exec", "open", "sh", "-c", "echo honey > /dev/shm/jar"]);
    assert_eq!(run(host, &["--ipc", "container:open", "busybox", "cat", "/dev/shm/jar"]).trim(), "honey");
    let joined = host.docker_fails(&["run", "--rm", "--ipc", "container:closed", "busybox", "true"]);
    assert!(joined.contains("non-shareable IPC"), "{joined}");
    let none = run(host, &["--ipc", "none", "busybox", "sh", "-c", "grep -c /dev/shm /proc/mounts || true"]);
    assert_eq!(none.trim(), "0");
    // Also on a host whose queues are mounted nowhere.
    run(host, &["--ipc", "host", "busybox", "ls", "/dev/mqueue", "/dev/shm"]);
    let mounted = || {
        let mounts = std::fs::read_to_string(format!("/proc/{}/mounts", host.daemon_pid())).unwrap();
        mounts.lines().filter(|line| line.contains("/shm ") && line.contains("/containers/")).count()
    };
    assert_eq!(mounted(), 1);
    host.docker(&["rm", "-f", "open"]);
    assert_eq!(mounted(), 0, "nothing is left of it");
}

#[test]
fn mounts_are_as_they_are_asked_for() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    // A part of a volume, and of a directory without what is mounted below it.
    run(
        host,
        &[
            "-v",
            "data:/data",
            "busybox",
            "sh",
            "-c",
            "mkdir -p /data/a/b; echo part > /data/a/b/f; ln -s /etc /data/out",
        ],
    );
    let part = ["--mount", "type=volume,src=data,dst=/p,volume-subpath=a/b", "busybox", "cat", "/p/f"];
    assert_eq!(run(host, &part).trim(), "part");
    // It may be a file.
    let file =
        ["--mount", "type=volume,src=data,dst=/etc/passwd,volume-subpath=a/b/f", "busybox", "cat", "/etc/passwd"];
    assert_eq!(run(host, &file).trim(), "part");
    let away = ["run", "--rm", "--mount", "type=volume,src=data,dst=/p,volume-subpath=a/c", "busybox", "true"];
    assert!(host.docker_fails(&away).contains("cannot access path a/c of volume data"), "what is not there is named");
    let out = ["run", "--rm", "--mount", "type=volume,src=data,dst=/p,volume-subpath=out", "busybox", "true"];
    assert!(host.docker_fails(&out).contains("out"), "no link leads out");
    // What others have comes before what is only named by its place, and is not filled from this image.
    host.docker(&["create", "--name", "owner", "-v", "data:/data", "busybox", "true"]);
    assert!(run(host, &["--volumes-from", "owner", "-v", "/data", "busybox", "ls", "/data"]).contains('a'));
    assert!(host.docker_fails(&["run", "--rm", "--volumes-from", "owner:bar", "busybox", "true"]).contains("bar"));
    // A file of one's own in the place of the daemon's.
    let resolv = host.dir().join("resolv");
    std::fs::write(&resolv, "nameserver 10.1.1.1\n").unwrap();
    let own = format!("{}:/etc/resolv.conf", resolv.display());
    assert_eq!(run(host, &["-v", &own, "busybox", "cat", "/etc/resolv.conf"]).trim(), "nameserver 10.1.1.1");
    // The daemon's own data is not held by whoever is shown it.
    let root = format!("{}:/data", host.data().display());
    host.docker(&["create", "--name", "nosy", "-v", &root, "--tmpfs", "/t", "-v", "data:/d:ro", "busybox", "true"]);
    let told = "{{range .Mounts}}{{.Destination}} {{.Mode}} {{.Propagation}};{{end}}";
    let told = host.docker(&["inspect", "-f", told, "nosy"]);
    let told: std::collections::BTreeSet<_> = told.trim().split_terminator(';').collect();
    assert_eq!(told, ["/d ro ", "/data  rslave"].into(), "and no tmpfs");
    let private = format!("{root}:private");
    assert!(host.docker_fails(&["create", "-v", &private, "busybox", "true"]).contains("rslave"));
    // What is mounted below a directory goes with it, as little to be written.
    let outer = host.dir().join("outer");
    std::fs::create_dir_all(outer.join("below")).unwrap();
    let below = outer.join("below").display().to_string();
    assert!(host.exec("mount", &["-t", "tmpfs", "tmpfs", &below]).success);
    let write = ["busybox", "touch", "/o/below/file"];
    let read_only = format!("{}:/o:ro", outer.display());
    assert!(host.docker_fails(&[&["run", "--rm", "-v", &read_only], &write[..]].concat()).contains("Read-only"));
    let bind = |how: &str| format!("type=bind,src={},dst=/o,readonly{how}", outer.display());
    run(host, &[&["--mount", &bind(",bind-recursive=writable")], &write[..]].concat());
    assert!(std::fs::metadata(outer.join("below/file")).is_err(), "it is in the host's own mounts");
    let alone = ["--mount", &bind(",bind-recursive=disabled"), "busybox", "ls", "/o/below"];
    assert_eq!(run(host, &alone), "");
    assert!(host.exec("umount", &[&below]).success);
}

#[test]
fn copies_are_of_what_the_container_sees() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    // What is mounted, what a link leads to, what is in a directory.
    let copied = host.dir().join("copied");
    std::fs::create_dir(&copied).unwrap();
    let into = |name: &str| copied.join(name).display().to_string();
    host.docker(&[
        "run",
        "-d",
        "--name",
        "source",
        "-h",
        "sources",
        "busybox",
        "sh",
        "-c",
        "mkdir /d; echo 1 > /d/f; ln -s d /l; sleep 600",
    ]);
    host.docker(&["cp", "source:/etc/hostname", &into("hostname")]);
    assert_eq!(std::fs::read_to_string(copied.join("hostname")).unwrap(), "sources\n");
    host.docker(&["cp", "source:/l/", &into("l")]);
    assert_eq!(std::fs::read_to_string(copied.join("l/f")).unwrap(), "1\n");
    host.docker(&["cp", "source:/d/.", &into("new")]);
    assert_eq!(std::fs::read_to_string(copied.join("new/f")).unwrap(), "1\n");
    // What links lead to is told as a path of the container, and what is there is replaced if that is asked for.
    let socket = host.dir().join("skep.sock").display().to_string();
    let script = format!(
        "curl -sI --unix-socket {socket} 'http://d/containers/source/archive?path=/l' | tr -d '\\r' |
         sed -n 's/^x-docker-container-path-stat: //p' | base64 -d"
    );
    let told = host.exec("sh", &["-c", &script]).stdout;
    assert!(told.contains("\"linkTarget\":\"/d\""), "{told}");
    let archive = copied.join("d.tar");
    std::fs::write(copied.join("d"), "a file").unwrap();
    assert!(host.exec("tar", &["-cf", archive.to_str().unwrap(), "-C", copied.to_str().unwrap(), "d"]).success);
    let put = |query: &str| {
        let url = format!("http://d/containers/source/archive?path=/{query}");
        let body = format!("@{}", archive.display());
        host.exec("curl", &["-s", "-X", "PUT", "--data-binary", &body, "--unix-socket", &socket, &url]).stdout
    };
    assert!(put("&noOverwriteDirNonDir=true").contains("could not be copied"));
    assert_eq!(host.docker(&["exec", "source", "cat", "/d/f"]), "1\n");
    assert_eq!(put(""), "");
    assert_eq!(host.docker(&["exec", "source", "cat", "/d"]), "a file");
    // With -a, what comes is the container's user's.
    host.docker(&["create", "--name", "owned", "-u", "33:44", "busybox", "ls", "-ln", "/tmp/hostname"]);
    host.docker(&["cp", "-a", &into("hostname"), "owned:/tmp/hostname"]);
    assert!(host.docker(&["start", "-a", "owned"]).contains(" 33 "));
    host.docker(&["run", "-d", "--name", "guarded", "-v", "data:/data:ro", "busybox", "sleep", "600"]);
    assert!(host.docker_fails(&["cp", &into("hostname"), "guarded:/data"]).contains("marked read-only"));
}

#[test]
fn files_are_whole_though_their_container_ends_meanwhile() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    let archive = host.dir().join("archive").display().to_string();
    for number in 0..10 {
        let name = format!("short-{number}");
        host.docker(&["run", "-d", "--name", &name, "busybox", "true"]);
        host.docker(&["export", "-o", &archive, &name]);
        let listed = Command::new("tar").args(["-tf", &archive]).output().unwrap().stdout;
        assert!(String::from_utf8_lossy(&listed).contains("bin/busybox"), "export {number} is empty");
    }
    // A client that goes leaves nothing half done.
    host.docker(&["run", "-d", "--name", "deaf", "busybox", "sh", "-c", "trap : TERM; while :; do sleep 1; done"]);
    let mut client =
        Command::new("docker").arg("-H").arg(host.socket()).args(["stop", "-t", "2", "deaf"]).spawn().unwrap();
    wait_until("the container is being stopped", LIMIT, || {
        let told = host.docker(&["events", "--since", "0", "--until", "0s", "--filter", "event=kill"]);
        (told.contains("name=deaf"), told)
    });
    client.kill().unwrap();
    client.wait().unwrap();
    wait_until("it is stopped all the same", LIMIT, || {
        let state = host.docker(&["inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "deaf"]);
        (state.trim() == "exited 137", state)
    });
    // One that is started again and again goes when it is to; one that goes at its end is restarted all the same.
    host.docker(&["run", "-d", "--name", "busy", "--restart", "always", "busybox", "false"]);
    host.docker(&["rm", "-f", "busy"]);
    host.docker(&["run", "-d", "--name", "passing", "--rm", "busybox", "sleep", "600"]);
    host.docker(&["restart", "-t", "0", "passing"]);
    assert_eq!(host.docker(&["inspect", "-f", "{{.State.Running}}", "passing"]).trim(), "true");
    host.docker(&["kill", "passing"]);
    wait_until("it is gone", LIMIT, || {
        let left = host.docker(&["ps", "-a", "--format", "{{.Names}}"]);
        (!left.contains("passing"), left)
    });
}

#[test]
fn subnets_of_ipv6_say_that_it_is_wanted_and_may_keep_addresses_back() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    let subnet = ["--subnet", "fd00:5::/64", "--ip-range", "fd00:5::100/120"];
    host.docker(&[&["network", "create"], &subnet[..], &["--aux-address", "router=fd00:5::100", "green"]].concat());
    let address = "{{(index .NetworkSettings.Networks \"green\").GlobalIPv6Address}}";
    host.docker(&["run", "-d", "--name", "leaf", "--net", "green", "busybox", "sleep", "600"]);
    assert_eq!(host.docker(&["inspect", "-f", address, "leaf"]).trim(), "fd00:5::101");
    let outside = ["--subnet", "fd00:6::/64", "--ip-range", "fd00:7::/96"];
    assert!(
        host.docker_fails(&[&["network", "create"], &outside[..], &["grey"]].concat()).contains("no matching subnet")
    );
    let off = ["network", "create", "--ipv6=false", "--subnet", "fd00:6::/64", "grey"];
    assert!(host.docker_fails(&off).contains("turned off"));
}

#[test]
fn events_tell_what_was_done_to_containers() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    host.docker(&["network", "create", "front"]);
    host.docker(&["run", "-d", "--name", "busy", "--net", "front", "-v", "data:/data", "busybox", "sleep", "600"]);
    host.docker(&["cp", "busy:/etc/hostname", "-"]);
    host.docker(&["top", "busy"]);
    host.docker(&["commit", "busy", "kept"]);
    host.docker(&["rename", "busy", "calm"]);
    host.docker(&["rm", "-f", "calm"]);
    let now = host.docker(&["info", "-f", "{{.SystemTime}}"]).trim().to_owned();
    let told = |filters: &[&str]| {
        let all = [&["events", "--until", &now, "--format", "{{.Type}} {{.Action}}"], filters].concat();
        host.docker(&all)
    };
    let all = told(&[]);
    for want in [
        "container create",
        "network connect",
        "volume mount",
        "container start",
        "container archive-path",
        "container top",
        "container commit",
        "container rename",
        "network disconnect",
        "volume unmount",
        "container destroy",
    ] {
        assert!(all.lines().any(|line| line == want), "{want} is not told: {all}");
    }
    assert!(told(&["--filter", "image=busybox"]).contains("container start"), "of containers of an image, too");
    // Of the swarm, too, in the order of time.
    host.docker(&["swarm", "init", "--advertise-addr", host.addr()]);
    host.docker(&["network", "create", "-d", "overlay", "tide"]);
    host.docker(&["run", "--rm", "--name", "late", "busybox", "true"]);
    host.docker(&["service", "create", "-d", "--name", "ebb", "--replicas", "0", "--no-resolve-image", "busybox"]);
    host.docker(&["service", "scale", "-d", "ebb=0", "ebb=1"]);
    host.docker(&["node", "update", "--availability", "drain", host.name()]);
    let now = host.docker(&["info", "-f", "{{.SystemTime}}"]).trim().to_owned();
    let updates =
        host.docker(&["events", "--until", &now, "--filter", "event=update", "--format", "{{json .Actor.Attributes}}"]);
    for want in [
        r#""name":"ebb","replicas.new":"1","replicas.old":"0""#,
        r#""availability.new":"drain","availability.old":"active""#,
    ] {
        assert!(updates.contains(want), "{want} is not told: {updates}");
    }
    let all = host.docker(&["events", "--until", &now, "--format", "{{.Type}} {{.Action}} {{.Actor.Attributes.name}}"]);
    let at =
        |want: &str| all.lines().position(|line| line == want).unwrap_or_else(|| panic!("{want} is not told: {all}"));
    assert!(at("container create busy") < at("network create tide"));
    assert!(at("network create tide") < at("container create late"), "{all}");
    assert!(!all.contains("container stop"), "what is removed by force is not stopped first: {all}");
    let backwards = ["events", "--since", "2020-01-02T00:00:00Z", "--until", "2020-01-01T00:00:00Z"];
    assert!(host.docker_fails(&backwards).contains("`since` time cannot be after `until`"));
}

#[test]
fn output_of_services_is_told_as_that_of_containers() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    host.docker(&["swarm", "init", "--advertise-addr", host.addr()]);
    let create = ["service", "create", "-d", "--no-resolve-image"];
    let both = "echo out; echo err >&2; sleep 600";
    host.docker(&[&create[..], &["--name", "shown", "-t", "busybox", "sh", "-c", both]].concat());
    let told = [
        "--log-driver",
        "json-file",
        "--log-opt",
        "env=HIVE",
        "-e",
        "HIVE=one",
        "--mount",
        "type=tmpfs,dst=/t",
        "--host",
        "db:10.9.9.9",
    ];
    host.docker(
        &[&create[..], &["--name", "told"], &told, &["busybox", "sh", "-c", "cat /etc/hosts; sleep 600"]].concat(),
    );
    // A terminal has one stream, as it is.
    wait_until("the terminal's output is there", LIMIT, || {
        let output = host.docker(&["service", "logs", "--raw", "shown"]);
        (output == "out\r\nerr\r\n", format!("{output:?}"))
    });
    assert!(host.ok(&["service", "logs", "shown"]).lines().all(|line| line.starts_with("shown.1.")));
    wait_until("what options name stands before each line", LIMIT, || {
        let output = host.docker(&["service", "logs", "--raw", "--details", "told"]);
        let named = output.contains("HIVE=one,com.docker.swarm.node.id=") && output.contains(" 10.9.9.9\tdb");
        (named, output)
    });
    let container = host.docker(&["ps", "-q", "--filter", "label=com.docker.swarm.service.name=told"]);
    let mounts = host.docker(&["inspect", "-f", "{{json .HostConfig.Mounts}}", container.trim()]);
    assert!(
        mounts.contains(r#""Target":"/t","Type":"tmpfs""#) || mounts.contains(r#""Type":"tmpfs","Target":"/t""#),
        "{mounts}"
    );
}

#[test]
fn what_containers_do_not_say_the_daemon_says() {
    take_turn!();
    if !has_docker() {
        return;
    }
    let rig = Rig::new(1);
    let host = rig.host(1);
    let init = host.dir().join("init").display().to_string();
    std::fs::write(&init, "#!/bin/busybox sh\n[ \"$1\" = -- ] && shift\nMARK=ours exec \"$@\"\n").unwrap();
    assert!(host.exec("chmod", &["755", &init]).success);
    let settings = [
        ["--bip=10.88.0.1/24", "--fixed-cidr=10.88.0.128/25", "--mtu=1400", "--ip=127.0.0.1"],
        ["--dns=10.88.0.53", "--dns-search=hive.example", "--dns-opt=ndots:3", "--host-gateway-ip=10.9.8.7"],
        ["--default-ulimit=nofile=123:456", "--default-shm-size=32m", "--default-ipc-mode=shareable", "--init"],
        ["--default-address-pool=base=10.89.0.0/16,size=24", "--userland-proxy=false", "--group=0", "--debug"],
    ];
    let network = "--default-network-opt=bridge=com.docker.network.driver.mtu=1300";
    let init_path = format!("--init-path={init}");
    host.start_daemon_with(&[&settings.concat()[..], &[network, &init_path]].concat());
    host.import_busybox();
    let look = "ip -4 -o addr show eth0; cat /sys/class/net/eth0/mtu /etc/resolv.conf; ulimit -Sn; ulimit -Hn; \
                df -k /dev/shm; echo mark=$MARK; grep gate /etc/hosts; true";
    let told = run(host, &["--add-host", "gate:host-gateway", "busybox", "sh", "-c", look]);
    for want in [
        "inet 10.88.0.128/24",
        "\n1400\n",
        "nameserver 10.88.0.53",
        "search hive.example",
        "ndots:3",
        "\n123\n456\n",
        " 32768 ",
        "mark=ours",
        "10.9.8.7\tgate",
    ] {
        assert!(told.contains(want), "{want:?}: {told}");
    }
    // What they say counts.
    let own = ["--dns", "10.88.0.54", "--ulimit", "nofile=99", "--shm-size", "16m", "--init=false"];
    let told = run(host, &[&own[..], &["busybox", "sh", "-c", look]].concat());
    for want in ["nameserver 10.88.0.54", "\n99\n99\n", " 16384 ", "mark=\n"] {
        assert!(told.contains(want), "{want:?}: {told}");
    }
    host.docker(&["run", "-d", "--name", "open", "-p", "8088:80", "busybox", "sleep", "600"]);
    assert_eq!(host.docker(&["port", "open"]).trim(), "80/tcp -> 127.0.0.1:8088");
    host.docker(&["network", "create", "green"]);
    assert_eq!(
        host.docker(&["network", "inspect", "-f", "{{(index .IPAM.Config 0).Subnet}}", "green"]).trim(),
        "10.89.0.0/24"
    );
    assert_eq!(run(host, &["--net", "green", "busybox", "cat", "/sys/class/net/eth0/mtu"]).trim(), "1300");
    let mtu = "com.docker.network.driver.mtu=1200";
    host.docker(&[
        "network",
        "create",
        "-o",
        mtu,
        "-o",
        "com.docker.network.bridge.host_binding_ipv4=10.77.0.1",
        "blue",
    ]);
    assert_eq!(run(host, &["--net", "blue", "busybox", "cat", "/sys/class/net/eth0/mtu"]).trim(), "1200");
    host.docker(&["run", "-d", "--name", "bound", "--net", "blue", "-p", "8089:80", "busybox", "sleep", "600"]);
    assert_eq!(host.docker(&["port", "bound"]).trim(), "80/tcp -> 10.77.0.1:8089");
    assert!(
        host.docker_fails(&["network", "create", "-o", "com.docker.network.driver.mtu=big", "red"]).contains("mtu")
    );
}

#[test]
fn a_container_has_the_limits_of_the_daemon_that_starts_it() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    let look = ["busybox", "sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -c"];
    host.docker(&[&["create", "--name", "limited", "--ulimit", "core=512"], &look[..]].concat());
    for (flag, want) in [("nofile=123:456", "123\n456\n"), ("nofile=77:88", "77\n88\n")] {
        host.stop_daemon();
        host.start_daemon_with(&["--log-format=json", "--default-ulimit", flag]);
        let told = host.docker(&["start", "-a", "limited"]);
        assert!(told.starts_with(want), "{told}");
    }
    let own = host.docker(&["inspect", "-f", "{{json .HostConfig.Ulimits}}", "limited"]);
    assert_eq!(own.trim(), r#"[{"Name":"core","Hard":512,"Soft":512}]"#);
    let log = host.log();
    let ready = log.lines().rev().find(|line| line.contains("the daemon is ready")).unwrap();
    let line: serde_json::Value = serde_json::from_str(ready).unwrap();
    assert_eq!((line["level"].as_str(), line["msg"].as_str()), (Some("info"), Some("the daemon is ready")), "{line}");
    assert!(line["version"].is_string() && line["time"].as_str().is_some_and(|time| time.ends_with('Z')), "{line}");
}

#[test]
fn a_file_of_settings_is_looked_through_before_anything_is_done() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    let file = host.dir().join("daemon.json");
    let check = |text: &str| {
        std::fs::write(&file, text).unwrap();
        host.run(&["daemon", "--validate", "--config-file", file.to_str().unwrap()])
    };
    let good =
        check(r#"{"dns": ["10.0.0.2"], "features": {"buildkit": true}, "proxies": {"http-proxy": "http://p:1"}}"#);
    assert_eq!((good.success, good.stdout.as_str()), (true, "configuration OK\n"), "{good:?}");
    let bad = check(r#"{"dns": ["nowhere"], "iptables": false, "bip": "10.0.0.1"}"#);
    for want in ["nowhere", "iptables: false cannot be had", "bip \"10.0.0.1\""] {
        assert!(!bad.success && bad.stderr.contains(want), "{want}: {bad:?}");
    }
}

#[test]
fn what_cannot_be_is_refused_in_the_words_that_clients_look_for() {
    take_turn!();
    let Some(rig) = Rig::with_docker_and_busybox() else { return };
    let host = rig.host(1);
    host.docker(&["create", "--name", "has", "-v", "jar:/jar", "busybox", "true"]);
    for (args, want) in [
        (&["tag", "busybox", "sha256:some"][..], "refusing to create an ambiguous tag using digest algorithm as name"),
        (&["create", "--health-interval", "1us", "busybox"], "Interval in Healthcheck cannot be less than 1ms"),
        (&["create", "--health-cmd", "x", "--health-timeout", "10us", "busybox"], "Timeout in Healthcheck"),
        (&["create", "--annotation", "=x", "busybox"], "invalid"),
        (
            &["create", "--mount", "type=volume,src=jar,dst=/j,volume-subpath=../x", "busybox"],
            "subpath must be a relative path within the volume",
        ),
        (&["run", "--mount", "type=volume,src=jar,dst=/j,volume-subpath=x", "busybox", "true"], "cannot access path x"),
        (&["cp", "has:/etc/passwd/", "-"], "not a directory"),
        (&["cp", "has:/none", "-"], "Could not find the file /none in container"),
        (&["volume", "rm", "jar"], "volume is in use"),
        (&["pull", "127.0.0.1:1/absent"], "127.0.0.1:1/absent"),
    ] {
        let why = host.docker_fails(args);
        assert!(why.contains(want), "docker {args:?} should say {want:?}: {why}");
    }
    let socket = host.socket();
    let socket = socket.trim_start_matches("unix://");
    let post = |kind: &str, body: &str, path: &str| {
        let (kind, url) = (format!("Content-Type: {kind}"), format!("http://daemon{path}"));
        let args = ["-s", "--unix-socket", socket, "-H", &kind, "-d", body, "-w", " %{http_code}", &url];
        host.exec("curl", &args).stdout
    };
    for (kind, body, path, want) in [
        (
            "text/plain",
            "{}",
            "/volumes/create",
            "unsupported Content-Type header (text/plain): must be 'application/json'",
        ),
        ("text/plain", "{}", "/commit", "unsupported Content-Type header"),
        ("text/plain", "{}", "/exec/none/start", "unsupported Content-Type header"),
        ("application/json", "{} {}", "/volumes/create", "unexpected content after JSON"),
        ("application/json", "{a", "/networks/create", "invalid JSON"),
    ] {
        let told = post(kind, body, path);
        assert!(told.contains(want) && told.ends_with(" 400"), "{path} should say {want:?}: {told}");
    }
    let told = post("application/json", "{}", "/volumes/create");
    assert!(told.ends_with(" 201"), "{told}");
    // Clients of long ago mean all volumes when they prune, those of today the ones without a name.
    host.docker(&["container", "prune", "-f"]);
    let pruned = |version: &str| post("application/json", "", &format!("/{version}/volumes/prune"));
    assert!(!pruned("v1.42").contains("\"jar\""));
    let old = pruned("v1.41");
    assert!(old.contains("\"jar\""), "{old}");
    // A pull that brings nothing is no success.
    let told = post("application/json", "", "/images/create?fromImage=127.0.0.1:1/absent&tag=latest");
    assert!(told.contains("message") && !told.ends_with(" 200"), "{told}");
}
