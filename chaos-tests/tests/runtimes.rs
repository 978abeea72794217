//! Containers by other OCI runtimes than the built-in one: runc and crun.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use skep_chaos_tests::{Host, LIMIT, Rig, take_turn, wait_until};

fn path(name: &str) -> String {
    let places = [format!("/usr/sbin/{name}"), format!("/usr/bin/{name}")];
    places.into_iter().find(|path| std::path::Path::new(path).exists()).unwrap()
}

fn run_all_of_it(host: &Host, runtime: &str, flags: &[&str]) {
    let by = ["--runtime", runtime];
    assert_eq!(host.ok(&[&["run", "--rm"], &by[..], &["busybox", "sh", "-c", "echo $((6*7))"]].concat()), "42\n");
    assert_eq!(host.ok(&[&["run", "--rm", "-t"], &by[..], &["busybox", "tty"]].concat()), "/dev/pts/0\r\n");
    let missing = host.fails(&[&["run", "--rm"], &by[..], &["busybox", "nonsense"]].concat());
    assert!(missing.contains("nonsense") && missing.contains("not found"), "{runtime}: {missing}");
    let code = format!("skep -H {} run --rm --runtime {runtime} busybox sh -c 'exit 7'; echo $?", host.socket());
    let program = skep_chaos_tests::program();
    let code = host.exec("sh", &["-c", &code.replacen("skep", program.to_str().unwrap(), 1)]);
    assert_eq!(code.stdout, "7\n", "{code:?}");

    host.ok(
        &[&["run", "-d", "--name", "box", "-m", "64m", "-u", "web"], &by[..], &["busybox", "sleep", "1000"]].concat()
    );
    assert_eq!(host.ok(&["inspect", "-f", "{{.HostConfig.Runtime}}", "box"]).trim(), runtime);
    assert_eq!(host.ok(&["exec", "box", "id", "-u"]), "1000\n");
    assert_eq!(host.ok(&["exec", "-t", "-u", "0", "-w", "/tmp", "box", "sh", "-c", "pwd; id -u"]), "/tmp\r\n0\r\n");
    let filtered = host.ok(&["exec", "box", "grep", "-E", "^(Seccomp|NoNewPrivs):", "/proc/self/status"]);
    assert_eq!(filtered, "NoNewPrivs:\t1\nSeccomp:\t2\n", "{runtime}");
    let write =
        "for file in $(find /sys/fs/cgroup -name memory.limit_in_bytes -o -name memory.max); do echo 1 > $file; done";
    assert!(!host.run(&["exec", "-u", "0", "box", "sh", "-c", write]).success, "{runtime}: its own limits");
    host.ok(&["pause", "box"]);
    assert!(host.fails(&["exec", "box", "true"]).contains("paused"));
    host.ok(&["unpause", "box"]);
    host.ok(&["update", "--memory", "96m", "box"]);

    // It outlives the daemon, and its end is known to the next.
    host.kill_daemon();
    host.start_daemon_with(flags);
    assert_eq!(host.ok(&["exec", "box", "id", "-u"]), "1000\n");
    host.ok(&["stop", "-t", "0", "box"]);
    assert_eq!(host.ok(&["wait", "box"]).trim(), "137");
    host.ok(&["start", "box"]);
    host.ok(&["rm", "-f", "box"]);
    let left = host.exec("ls", &[&host.dir().join("run").join("external").display().to_string()]);
    assert_eq!(left.stdout, "", "{runtime} left something");
}

#[test]
fn containers_are_run_by_other_runtimes_as_by_our_own() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    let runtimes = ["runc", "crun"].map(|name| format!("{name}={}", path(name)));
    let flags = ["--add-runtime", &runtimes[0], "--add-runtime", &runtimes[1], "--default-runtime", "crun"];
    host.start_daemon_with(&flags);
    host.import_busybox();
    // Where both versions of cgroups have controllers, crun takes neither: this host has the first alone.
    let unified = "/sys/fs/cgroup/unified";
    if std::fs::read_to_string(format!("{unified}/cgroup.controllers")).is_ok_and(|text| !text.trim().is_empty()) {
        assert!(host.exec("umount", &[unified]).success);
    }
    for runtime in ["runc", "crun"] {
        run_all_of_it(host, runtime, &flags);
    }
    assert!(
        host.fails(&["run", "--runtime", "kata", "busybox", "true"]).contains("unknown or invalid runtime name: kata")
    );
    assert_eq!(host.ok(&["info", "-f", "{{.DefaultRuntime}}"]).trim(), "crun");

    // Tasks of the swarm have the daemon's own.
    host.ok(&["swarm", "init", "--advertise-addr", host.addr()]);
    host.ok(&["service", "create", "-d", "--name", "web", "skep/whoami"]);
    host.await_replicas("web", "1/1");
    let id = host.ok(&["ps", "-q"]);
    assert_eq!(host.ok(&["inspect", "-f", "{{.HostConfig.Runtime}}", id.trim()]).trim(), "crun");
    host.ok(&["service", "rm", "web"]);
    wait_until("its container is gone", LIMIT, || {
        let list = host.ok(&["ps", "-a", "-q"]);
        (list.is_empty(), list)
    });
}

#[test]
fn a_container_gets_no_more_of_a_disk_than_it_is_let() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon();
    host.import_busybox();
    // Any disk of this machine's; its node need not be in /dev.
    let partitions = std::fs::read_to_string("/proc/partitions").unwrap();
    let Some(line) = partitions.lines().nth(2) else { return };
    let fields: Vec<&str> = line.split_whitespace().collect();
    let disk = host.dir().join("disk").display().to_string();
    assert!(host.exec("mknod", &[&disk, "b", fields[0], fields[1]]).success);
    let limit = format!("--device-write-bps={disk}:1mb");
    host.ok(&["run", "-d", "--name", "slow", &limit, "busybox", "sleep", "1000"]);
    let told = host.ok(&[
        "exec",
        "slow",
        "sh",
        "-c",
        "cat /sys/fs/cgroup/blkio/blkio.throttle.write_bps_device || cat /sys/fs/cgroup/io.max",
    ]);
    assert!(told.contains(&format!("{}:{} ", fields[0], fields[1])) && told.contains("1048576"), "{told}");
    for (flag, why) in [("/not/there:1mb", "/not/there"), ("/dev/null:1mb", "no block device"), ("disk", "PATH:AMOUNT")]
    {
        let refused = host.fails(&["run", "--rm", "--device-read-bps", flag, "busybox", "true"]);
        assert!(refused.contains(why), "{refused}");
    }
    host.ok(&["rm", "-f", "slow"]);
}

#[test]
fn the_host_s_devices_are_mounted_as_they_are_and_none_of_them_is_changed() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon_with(&["--add-runtime", &format!("runc={}", path("runc"))]);
    host.import_busybox();
    let listed = || host.exec("sh", &["-c", "cd /dev; stat -c '%n %f %t %T %i' * | sort"]).stdout;
    let before = listed();
    assert!(before.contains("loop0 ") || before.contains("kmsg "), "the host has devices that containers have not");
    for runtime in ["skep", "runc"] {
        let run = |flags: &[&str], script: &str| {
            let flags = [&["run", "--rm", "--runtime", runtime, "-v", "/dev:/dev"], flags].concat();
            host.ok(&[&flags[..], &["busybox", "sh", "-c", script]].concat())
        };
        let seen = run(&[], "cd /dev; stat -c '%n %f %t %T %i' * | sort");
        let own = |line: &&str| !line.starts_with("ptmx ") && !line.starts_with("pts ");
        assert!(before.lines().filter(own).eq(seen.lines().filter(own)), "{runtime}: {before} became {seen}");
        assert_eq!(run(&["--privileged"], "echo x > /dev/null; cat /dev/null"), "", "{runtime}");
        let refused =
            host.fails(&["run", "--rm", "--runtime", runtime, "-v", "/dev:/dev:ro", "busybox", "touch", "/dev/new"]);
        assert!(refused.contains("Read-only file system"), "{runtime}: {refused}");
    }
    // Terminals are the container's own, also for who is not root.
    let run = |flags: &[&str]| {
        host.ok(
            &[&["run", "--rm", "-t", "-v", "/dev:/dev"], flags, &["busybox", "sh", "-c", "tty; ls /dev/pts"]].concat()
        )
    };
    for user in ["0", "1000"] {
        assert_eq!(run(&["-u", user]), "/dev/pts/0\r\n0     ptmx\r\n");
    }
    std::fs::write(host.dir().join("note"), "here\n").unwrap();
    let shm = format!("{}:/dev/shm", host.dir().display());
    let below = ["run", "--rm", "-v", "/dev:/dev", "-v", &shm, "busybox", "cat", "/dev/shm/note"];
    assert_eq!(host.ok(&below), "here\n");
    let nowhere = host.fails(&["run", "--rm", "-v", "/dev:/dev", "-v", "/tmp:/dev/no/place", "busybox", "true"]);
    assert!(nowhere.contains("/tmp cannot be mounted at /dev/no/place: No such file"), "{nowhere}");
    assert_eq!(listed(), before);
}

#[test]
fn devices_come_by_the_names_that_vendors_give_them() {
    const VENDOR: &str = "cdiVersion: 0.7.0
kind: vendor.com/device
containerEdits:
  env: [ALL=of them]
devices:
- name: one
  containerEdits:
    env: [ONE=injected]
    deviceNodes:
    - {path: /dev/vendor1, hostPath: /dev/zero, permissions: r, fileMode: 292}
    mounts:
    - {hostPath: NOTE, containerPath: /lib/vendor/note, options: [ro, nosuid, nodev]}
    additionalGids: [44]
    hooks:
    - {hookName: createContainer, path: /bin/sh, args: [sh, -c, 'cat > STATE']}
";
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    let [dir, note, state] = ["cdi", "note", "state"].map(|name| host.dir().join(name));
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(&note, "noted\n").unwrap();
    let text = VENDOR.replace("NOTE", note.to_str().unwrap()).replace("STATE", state.to_str().unwrap());
    std::fs::write(dir.join("vendor.yaml"), text).unwrap();
    let runc = format!("runc={}", path("runc"));
    host.start_daemon_with(&["--cdi-spec-dir", dir.to_str().unwrap(), "--add-runtime", &runc]);
    host.import_busybox();
    let script = "echo $ALL, $ONE; stat -c '%t:%T %a' /dev/vendor1; cat /lib/vendor/note; id -G; echo > /dev/vendor1";
    for runtime in ["skep", "runc"] {
        let by = ["run", "--rm", "--runtime", runtime, "--device", "vendor.com/device=one", "-u", "web"];
        let ran = host.run(&[&by[..], &["busybox", "sh", "-c", script]].concat());
        assert_eq!(ran.stdout, "of them, injected\n1:5 444\nnoted\n1000 44\n", "{runtime}: {ran:?}");
        assert!(ran.stderr.contains("ermission denied"), "{runtime}: {ran:?}");
        let told = std::fs::read_to_string(&state).unwrap();
        assert!(told.contains("\"bundle\""), "{runtime}: the hook was told {told}");
        std::fs::remove_file(&state).unwrap();
    }
    let missing = host.fails(&["run", "--rm", "--device", "vendor.com/device=two", "busybox", "true"]);
    assert!(missing.contains("unresolvable CDI devices vendor.com/device=two"), "{missing}");
    assert!(missing.contains("name vendor.com/device=one"), "{missing}");
    assert!(host.fails(&["run", "--rm", "--device", "a=b", "busybox", "true"]).contains("no name of a device"));
    let info = host.api().get("/info").unwrap().body;
    assert_eq!(info["CDISpecDirs"][0], dir.to_str().unwrap());
    assert_eq!(info["DiscoveredDevices"][0]["ID"], "vendor.com/device=one");
    if host.exec("docker", &["--version"]).success {
        host.docker(&["run", "-d", "--name", "box", "--device", "vendor.com/device=one", "busybox", "sleep", "1000"]);
        let asked = host.docker(&["inspect", "-f", "{{json .HostConfig.DeviceRequests}}", "box"]);
        assert!(asked.contains("\"cdi\"") && asked.contains("vendor.com/device=one"), "{asked}");
        assert_eq!(host.docker(&["exec", "box", "sh", "-c", "echo $ONE"]), "injected\n");
    }
}
