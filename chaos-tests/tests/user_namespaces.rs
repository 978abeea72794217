//! Containers whose users own nothing on the host (`--userns-remap`).

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::os::unix::fs::MetadataExt as _;

use skep_chaos_tests::{Host, LIMIT, Rig, take_turn, wait_until};

const REMAPPED: [&str; 2] = ["--userns-remap", "default"];

/// A host where somebody else has ids already.
fn one_host() -> Rig {
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.own_etc();
    let others = "echo someone:100000:65536 > /etc/subuid && echo someone:300000:65536 > /etc/subgid";
    assert!(host.exec("sh", &["-c", others]).success);
    rig
}

/// An image with a file that is not root's.
fn import_box(host: &Host) {
    host.import("box", &[], |root| {
        std::fs::create_dir(root.join("data")).unwrap();
        std::fs::write(root.join("data/file"), "text").unwrap();
        std::os::unix::fs::chown(root.join("data/file"), Some(1000), Some(1000)).unwrap();
    });
}

/// The host's owner of a container's first process.
fn owner_of(host: &Host, container: &str) -> u32 {
    let pid = host.ok(&["inspect", "-f", "{{.State.Pid}}", container]);
    std::fs::metadata(format!("/proc/{}", pid.trim())).unwrap().uid()
}

#[test]
fn a_container_s_root_is_nobody_on_the_host() {
    take_turn!();
    let rig = one_host();
    let host = rig.host(1);
    host.start_daemon_with(&REMAPPED);
    import_box(host);
    // Behind those of someone else.
    assert_eq!(host.exec("grep", &["skepremap", "/etc/subuid"]).stdout, "skepremap:165536:65536\n");
    assert_eq!(host.exec("grep", &["skepremap", "/etc/subgid"]).stdout, "skepremap:365536:65536\n");
    let secret = host.dir().join("secret");
    std::fs::create_dir(&secret).unwrap();
    std::fs::write(secret.join("key"), "of root alone").unwrap();
    std::fs::set_permissions(secret.join("key"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let bind = format!("{}:/host", secret.display());
    host.ok(&[
        "run",
        "-d",
        "--name",
        "web",
        "-v",
        &bind,
        "-p",
        "8080:80",
        "box",
        "sh",
        "-c",
        "while true; do echo hello | nc -l -p 80; done",
    ]);
    assert_eq!(owner_of(host, "web"), 165_536);
    let inside = |command: &str| host.run(&["exec", "web", "sh", "-c", command]);
    assert_eq!(inside("id -u; cat /proc/self/uid_map | tr -s ' '").stdout, "0\n 0 165536 65536\n");
    assert!(!inside("cat /host/key").success && !inside("touch /host/new").success, "what is root's on the host");
    assert!(!inside("mount -t tmpfs none /tmp").success && !inside("mknod /disk b 254 0").success);
    wait_until("it answers on a low port", LIMIT, || {
        let said = host.exec("busybox", &["nc", "-w", "1", "127.0.0.1", "8080"]).stdout;
        (said == "hello\n", said)
    });
    // Of what containers are made there are views; of a node's keys there are none.
    let run = host.dir().join("run").display().to_string();
    let views = host.exec("sh", &["-c", &format!("ls {run}/id-maps/*/data")]).stdout;
    assert_eq!(views, "bin\ncontainers\nimage\nvolumes\n");
    for (flag, what) in [("--privileged", "privileged"), ("--network=host", "network"), ("--pid=host", "PID")] {
        let refused = host.fails(&["run", "--rm", flag, "box", "true"]);
        assert!(refused.contains(what) && refused.contains("--userns=host"), "{refused}");
    }
    assert_eq!(host.ok(&["run", "--rm", "--privileged", "--userns", "host", "box", "id", "-u"]), "0\n");
    let stranger = host.fails(&["run", "--rm", "--userns", "host", "--pid", "container:web", "box", "true"]);
    assert!(stranger.contains("other users"), "{stranger}");
    assert_eq!(host.ok(&["run", "--rm", "--network", "container:web", "box", "ls", "/sys/class/net"]), "eth0\nlo\n");
    host.kill_daemon();
    host.start_daemon_with(&REMAPPED);
    assert_eq!(inside("id -u").stdout, "0\n");
    assert_eq!(owner_of(host, "web"), 165_536);
    // Also without the flag what there is keeps its users; what is new has the host's.
    host.kill_daemon();
    host.start_daemon();
    assert_eq!(inside("id -u").stdout, "0\n");
    host.ok(&["restart", "-t", "0", "web"]);
    assert_eq!(owner_of(host, "web"), 165_536);
    host.ok(&["run", "-d", "--name", "plain", "box", "sleep", "1000"]);
    assert_eq!(owner_of(host, "plain"), 0);
    host.ok(&["rm", "-f", "web", "plain"]);
}

/// On disk nothing is shifted: images, volumes, copies and commits are the same for all.
#[test]
fn files_have_the_owners_that_containers_see() {
    take_turn!();
    let rig = one_host();
    let host = rig.host(1);
    host.start_daemon_with(&REMAPPED);
    import_box(host);
    let owners = |image: &str, flags: &[&str]| {
        let list = ["sh", "-c", "cd /data && stat -c '%n %u:%g' *"];
        host.ok(&[&["run", "--rm"], flags, &[image], &list].concat())
    };
    assert_eq!(owners("box", &[]), "file 1000:1000\n");
    // A volume is filled, and its files belong to whom they belong in every container.
    assert_eq!(owners("box", &["-v", "kept:/data"]), "file 1000:1000\n");
    host.ok(&["run", "--rm", "-v", "kept:/data", "box", "touch", "/data/made"]);
    assert_eq!(owners("box", &["-v", "kept:/data", "--userns", "host"]), "file 1000:1000\nmade 0:0\n");
    // One that is a file system of its own.
    host.ok(&["volume", "create", "-o", "type=tmpfs", "-o", "device=tmpfs", "-o", "o=uid=165536", "light"]);
    host.ok(&["run", "--rm", "-v", "light:/light", "box", "touch", "/light/made"]);

    host.ok(&["run", "-d", "--name", "web", "box", "sleep", "1000"]);
    let change = "cd /data && touch made && chown 5:6 made && rm file && mkdir dir && rm -r /tmp && mkdir /tmp";
    host.ok(&["exec", "web", "sh", "-c", change]);
    let own = host.dir().join("own");
    std::fs::write(&own, "mine").unwrap();
    std::os::unix::fs::chown(&own, Some(7), Some(7)).unwrap();
    host.ok(&["cp", "-a", own.to_str().unwrap(), "web:/data/"]);
    assert_eq!(host.ok(&["diff", "web"]), "C /data\nA /data/dir\nD /data/file\nA /data/made\nA /data/own\nC /tmp\n");
    let archive = host.dir().join("out.tar").display().to_string();
    host.ok(&["export", "-o", &archive, "web"]);
    let list = host.exec("tar", &["tvf", &archive, "--numeric-owner"]).stdout;
    for (name, owner) in [("data/made", " 5/6 "), ("data/own", " 7/7 "), ("data/dir/", " 0/0 ")] {
        assert!(list.lines().any(|line| line.ends_with(name) && line.contains(owner)), "{name}: {list}");
    }
    host.ok(&["commit", "web", "kept:1"]);
    for flags in [&[][..], &["--userns", "host"]] {
        assert_eq!(owners("kept:1", flags), "dir 0:0\nmade 5:6\nown 7:7\n");
    }
    host.ok(&["rm", "-f", "web"]);
    let context = host.dir().join("context");
    std::fs::create_dir(&context).unwrap();
    std::fs::write(context.join("note"), "note").unwrap();
    let file = "FROM box\nRUN touch /data/made && chown 5:6 /data/made\nCOPY --chown=8:9 note /data/\nRUN grep 165536 /proc/self/uid_map\n";
    std::fs::write(context.join("Dockerfile"), file).unwrap();
    host.ok(&["build", "-t", "built", context.to_str().unwrap()]);
    assert_eq!(owners("built", &[]), "file 1000:1000\nmade 5:6\nnote 8:9\n");
}

/// Further processes are the container's own in every way, whoever runs the container.
#[test]
fn processes_are_confined_as_without() {
    take_turn!();
    let rig = one_host();
    let host = rig.host(1);
    host.start_daemon_with(&[&REMAPPED[..], &["--add-runtime", "runc=/usr/sbin/runc"]].concat());
    host.import_busybox();
    let status = "grep -E '^(Uid|Cap...|NoNewPrivs|Seccomp):' /proc/self/status; cat /proc/self/uid_map | tr -s ' '";
    let look = |flags: &[&str], user: &str| {
        host.ok(&[&["run", "-d", "--name", "web"], flags, &["busybox", "sleep", "1000"]].concat());
        let first = host.ok(&["exec", "-u", user, "web", "sh", "-c", status]);
        host.ok(&["rm", "-f", "web"]);
        let run = host.ok(&[&["run", "--rm", "-u", user], flags, &["busybox", "sh", "-c", status]].concat());
        assert_eq!(run, first, "{flags:?}");
        run
    };
    let said = look(&[], "0");
    for line in
        ["CapEff:\t00000000a80425fb\n", "CapBnd:\t00000000a80425fb\n", "NoNewPrivs:\t1\n", "Seccomp:\t2\n", "165536"]
    {
        assert!(said.contains(line), "{line}: {said}");
    }
    let web = look(&[], "web");
    assert!(web.contains("Uid:\t1000") && web.contains("CapEff:\t0000000000000000\n"), "{web}");
    let gaining = look(&["--security-opt", "no-new-privileges=false"], "0");
    assert!(gaining.contains("NoNewPrivs:\t0\n") && gaining.contains("Seccomp:\t2\n"), "{gaining}");
    let profile = host.dir().join("profile.json");
    let text = r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["chroot"],"action":"SCMP_ACT_ERRNO"}]}"#;
    std::fs::write(&profile, text).unwrap();
    let own = format!("seccomp={}", profile.display());
    assert!(look(&["--security-opt", &own], "0").contains("Seccomp:\t2\n"));
    assert!(look(&["--security-opt", "seccomp=unconfined"], "0").contains("Seccomp:\t0\n"));
    let none = look(&["--cap-drop", "ALL", "--cap-add", "CHOWN"], "0");
    assert!(none.contains("CapEff:\t0000000000000001\n") && none.contains("CapBnd:\t0000000000000001\n"), "{none}");
    assert!(look(&["--runtime", "runc"], "0").contains("165536"));
    // A terminal belongs to who works at it.
    let terminal = host.ok(&["run", "--rm", "-t", "busybox", "sh", "-c", "stat -c %u $(tty); echo x > $(tty)"]);
    assert_eq!(terminal, "0\r\nx\r\n");
    host.ok(&["run", "-d", "--name", "web", "busybox", "sleep", "1000"]);
    let terminal = host.ok(&["exec", "-t", "web", "sh", "-c", "stat -c %u $(tty); echo x > $(tty)"]);
    assert_eq!(terminal, "0\r\nx\r\n");
    host.ok(&["rm", "-f", "web"]);
}

#[test]
fn tasks_have_such_users_too_and_their_secrets_belong_to_them() {
    take_turn!();
    let rig = one_host();
    let host = rig.host(1);
    host.start_daemon_with(&REMAPPED);
    rig.form_swarm(1);
    host.import_busybox();
    let file = host.dir().join("password");
    std::fs::write(&file, "open sesame").unwrap();
    host.ok(&["secret", "create", "password", file.to_str().unwrap()]);
    let secret = ["--secret", "source=password,target=/etc/pw,uid=1000,mode=0400"];
    let create =
        ["service", "create", "-d", "--name", "web", "--no-resolve-image", "-u", "web", "--publish", "8080:80"];
    host.ok(&[&create[..], &secret, &["busybox", "sleep", "1000"]].concat());
    host.await_replicas("web", "1/1");
    let task = host.ok(&["ps", "-q"]);
    assert_eq!(owner_of(host, task.trim()), 165_536 + 1000);
    assert_eq!(host.ok(&["exec", task.trim(), "cat", "/etc/pw"]), "open sesame");
    host.ok(&["service", "rm", "web"]);
    rig.await_no_container();
}

#[test]
fn a_user_without_ids_is_named() {
    take_turn!();
    let rig = one_host();
    let host = rig.host(1);
    for (asked, what) in [("nobody", "nobody:100000:65536"), ("nosuch", "nosuch"), ("0:nogroup-", "nogroup-")] {
        let ran = host.exec(skep_chaos_tests::program().to_str().unwrap(), &["daemon", "--userns-remap", asked]);
        assert!(!ran.success && ran.stderr.contains(what), "{ran:?}");
    }
}
