//! Attacks by what runs in containers, on the host and on its neighbours: each test tries one that worked
//! somewhere, and sees it fail. The numbers are those of the CVE list.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use skep_chaos_tests::{Host, LIMIT, SECRET, Scene, skip, take_turn, wait_until};

/// Looks for programs that are not its own in /proc/PID/exe, keeps them open, and tries to write them.
const WRITER: &str = r#"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
int main(void) {
    struct stat own, other;
    stat("/proc/self/exe", &own);
    int caught = 0, read_only = 0, written = 0;
    puts("ready"); fflush(stdout);
    for (;;) {
        DIR *proc = opendir("/proc");
        struct dirent *entry;
        while ((entry = readdir(proc))) {
            char path[300];
            if (!atoi(entry->d_name)) continue;
            snprintf(path, sizeof path, "/proc/%s/exe", entry->d_name);
            int fd = open(path, O_RDONLY);
            if (fd < 0) continue;
            fstat(fd, &other);
            if (other.st_ino != own.st_ino && other.st_size > 4 << 20) {
                caught++;
                struct statvfs view;
                fstatvfs(fd, &view);
                if (view.f_flag & ST_RDONLY) read_only++;
                snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
                if (open(path, O_WRONLY | O_APPEND) >= 0) written++;
                printf("caught %d read-only %d written %d\n", caught, read_only, written);
                fflush(stdout);
            }
            close(fd);
        }
        closedir(proc);
    }
}
"#;

/// CVE-2019-5736.
#[test]
fn the_host_s_program_cannot_be_written_from_inside() {
    take_turn!();
    let scene = Scene::with_hosts(1);
    let host = scene.host();
    let program = fs::read_link(format!("/proc/{}/exe", host.daemon_pid())).unwrap();
    let before = fs::read(&program).unwrap();
    let writer = scene.compile("writer", WRITER);
    host.import("hostile", &[], |root| {
        fs::copy(&writer, root.join("bin/writer")).unwrap();
        fs::write(root.join("bin/again"), "#!/proc/self/exe\n").unwrap();
        fs::set_permissions(root.join("bin/again"), fs::Permissions::from_mode(0o755)).unwrap();
    });
    scene.attack(&["--cap-add", "SYS_PTRACE"], "hostile", "exec writer");
    wait_until("the writer looks", LIMIT, || {
        let log = host.ok(&["logs", "attacker"]);
        (log.contains("ready"), log)
    });
    wait_until("the writer has caught the program", LIMIT, || {
        drop(host.run(&["exec", "attacker", "again"]));
        host.ok(&["exec", "attacker", "true"]);
        let log = host.ok(&["logs", "attacker"]);
        (log.contains("caught"), log)
    });
    drop(host.run(&["run", "--rm", "hostile", "/bin/again"]));
    let log = host.ok(&["logs", "attacker"]);
    // While it runs nobody can write it; that it is seen read-only outlasts that.
    for line in log.lines().skip(1) {
        let words: Vec<_> = line.split(' ').collect();
        assert!(words[1] == words[3] && words[5] == "0", "{line}");
    }
    assert_eq!(fs::read(&program).unwrap(), before, "the program has changed");
    host.ok(&["rm", "-f", "attacker"]);
}

/// CVE-2024-21626.
#[test]
fn no_descriptor_of_the_host_is_there_to_work_from() {
    take_turn!();
    let scene = Scene::with_hosts(1);
    let host = scene.host();
    host.ok(&["run", "-d", "--name", "box", "busybox", "sleep", "1000"]);
    let climb = format!("cat ../../../../../../..{}/secret; pwd", scene.path());
    for number in 3..24 {
        let dir = format!("/proc/self/fd/{number}");
        for run in [&["run", "--rm", "-w", &dir, "busybox"][..], &["exec", "-w", &dir, "box"]] {
            let ran = host.run(&[run, &["sh", "-c", &climb]].concat());
            assert!(!ran.stdout.contains(SECRET), "{run:?}: {ran:?}");
        }
    }
    // The last one is that of the listing itself.
    for run in [&["run", "--rm", "busybox"][..], &["exec", "box"]] {
        let list = host.ok(&[run, &["ls", "/proc/self/fd"]].concat());
        assert_eq!(list.split_whitespace().collect::<Vec<_>>(), ["0", "1", "2", "3"], "{run:?}");
    }
    host.ok(&["rm", "-f", "box"]);
}

/// CVE-2021-30465 and CVE-2024-45310.
#[test]
fn swapping_a_mount_point_for_a_link_leads_no_mount_out() {
    take_turn!();
    let scene = Scene::with_hosts(1);
    let host = scene.host();
    let up = format!("/../../../../../../../../..{}", scene.path());
    let swap = format!(
        "cd /shared; mkdir -p place a; ln -sfn {up} link; touch ready; \
         while true; do mv place a/x; mv link place; mv place link; mv a/x place; done"
    );
    scene.attack(&["-v", "shared:/shared"], "busybox", &swap);
    wait_until("the attacker swaps", LIMIT, || {
        (host.run(&["exec", "attacker", "ls", "/shared/ready"]).success, host.ok(&["logs", "attacker"]))
    });
    let mounts = || fs::read_to_string(format!("/proc/{}/mounts", host.daemon_pid())).unwrap();
    let until = Instant::now() + Duration::from_secs(8);
    let mut started = 0;
    while Instant::now() < until {
        let flags = ["run", "--rm", "-v", "shared:/shared", "-v", "inner:/shared/place", "--tmpfs", "/shared/place/t"];
        let ran = host.run(&[&flags[..], &["busybox", "sh", "-c", "cat /shared/place/secret; ls /shared"]].concat());
        assert!(!ran.stdout.contains(SECRET), "{ran:?}");
        started += u32::from(ran.success);
        scene.assert_intact();
    }
    assert!(!mounts().contains(&scene.path()), "{}", mounts());
    assert!(started > 0, "no start was let through: the attack was not tried");
    host.ok(&["rm", "-f", "attacker"]);
}

/// CVE-2018-15664 and CVE-2026-42306.
#[test]
fn files_are_copied_within_the_container_whatever_links_do() {
    take_turn!();
    let scene = Scene::with_hosts(1);
    let host = scene.host();
    let swap = format!(
        "mkdir -p /w/real{0} /v/real{0}; for d in /w /v; do echo inner > $d/real{0}/secret; cd $d; mkdir a; \
         ln -sfn / link; done; touch /ready; while true; do for d in /w /v; do cd $d; mv real a/x; mv link real; \
         mv real link; mv a/x real; done; done",
        scene.path()
    );
    scene.attack(&["-v", "volume:/v"], "busybox", &swap);
    wait_until("the attacker swaps", LIMIT, || {
        (host.run(&["exec", "attacker", "ls", "/ready"]).success, host.ok(&["logs", "attacker"]))
    });
    let (out, into) = (host.dir().join("out"), host.dir().join("into"));
    fs::write(&into, "from the user").unwrap();
    let until = Instant::now() + Duration::from_secs(6);
    let mut copied = 0;
    while Instant::now() < until {
        for dir in ["w", "v"] {
            let inner = format!("attacker:/{dir}/real{}/secret", scene.path());
            let _ = fs::remove_file(&out);
            if host.run(&["cp", &inner, out.to_str().unwrap()]).success {
                copied += 1;
                assert_ne!(fs::read_to_string(&out).unwrap(), SECRET, "a file of the host was copied");
            }
            drop(host.run(&["cp", into.to_str().unwrap(), &format!("attacker:/{dir}/real{}/", scene.path())]));
            scene.assert_intact();
        }
    }
    assert!(copied > 0, "nothing was copied: the attack was not tried");
    host.ok(&["rm", "-f", "attacker"]);
}

/// CVE-2024-41110 and CVE-2026-34040: who decides over a request has to see what is done by it.
#[test]
fn a_request_is_what_its_length_says() {
    take_turn!();
    let scene = Scene::with_hosts(1);
    let host = scene.host();
    let socket = host.socket();
    let ask = |request: &str| {
        let mut stream = UnixStream::connect(socket.trim_start_matches("unix://")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        // A server may close before all is sent.
        let _ = stream.write_all(request.as_bytes());
        let mut answer = Vec::new();
        // A server that does not close is as good as one that does.
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    };
    let body = r#"{"Image":"busybox","HostConfig":{"Privileged":true}}"#;
    let head =
        "POST /v1.41/containers/create?name=smuggled HTTP/1.1\r\nHost: skep\r\nContent-Type: application/json\r\n";
    let chunked = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    for (what, request) in [
        ("a length of nothing", format!("{head}Connection: close\r\nContent-Length: 0\r\n\r\n{body}")),
        ("two lengths", format!("{head}Content-Length: 0\r\nContent-Length: {}\r\n\r\n{body}", body.len())),
        ("no length", format!("{head}Connection: close\r\n\r\n{body}")),
        ("an unknown coding", format!("{head}Transfer-Encoding: x, chunked, y\r\n\r\n{chunked}")),
    ] {
        let answer = ask(&request);
        assert!(!answer.contains(" 201 "), "{what}: {answer}");
        assert!(!host.ok(&["ps", "-a"]).contains("smuggled"), "{what}: {answer}");
    }
    let large = format!("{{\"Image\":\"busybox\",\"Labels\":{{\"x\":\"{}\"}}}}", "x".repeat(64 << 20));
    let answer = ask(&format!("{head}Connection: close\r\nContent-Length: {}\r\n\r\n{large}", large.len()));
    assert!(!answer.contains(" 201 ") && !host.ok(&["ps", "-a"]).contains("smuggled"), "{answer:.200}");
}

/// CVE-2024-29018.
#[test]
fn an_internal_network_asks_nobody_outside() {
    take_turn!();
    let scene = Scene::with_hosts(2);
    let (host, outside) = (scene.host(), scene.rig.host(2));
    let log = outside.dir().join("packets");
    let script = format!("exec tcpdump -ln -i any udp port 53 or tcp port 53 > {} 2>&1", log.display());
    outside.spawn("sh", &["-c", &script]);
    wait_until("tcpdump listens", LIMIT, || {
        let text = fs::read_to_string(&log).unwrap_or_default();
        (text.contains("listening"), text)
    });
    let server = outside.addr().to_owned();
    host.ok(&["network", "create", "-d", "bridge", "--internal", "cellar"]);
    host.ok(&["network", "create", "-d", "bridge", "open"]);
    let ask = |network: &str, name: &str| {
        let look = format!("nslookup -type=a {name}; nslookup -type=a {name} {server}");
        let run = ["run", "--rm", "--network", network, "--dns", &server, "busybox", "timeout", "3", "sh", "-c", &look];
        drop(host.run(&run));
    };
    ask("cellar", "leaked.example.com");
    // The other way round the test sees what it is to see.
    ask("open", "allowed.example.com");
    wait_until("the open network's question comes", LIMIT, || {
        let text = fs::read_to_string(&log).unwrap_or_default();
        (text.contains("allowed.example.com"), text)
    });
    let text = fs::read_to_string(&log).unwrap();
    assert!(!text.contains("leaked"), "{text}");
    host.ok(&["network", "rm", "cellar", "open"]);
}

/// CVE-2025-54388: ports and containers of one host, tried from its neighbour.
#[test]
fn what_is_published_on_this_host_alone_is_reached_from_no_other() {
    take_turn!();
    let scene = Scene::with_hosts(2);
    let (host, other) = (scene.host(), scene.rig.host(2));
    host.ok(&["run", "-d", "--name", "own", "-p", "127.0.0.1:8088:80", "busybox", "httpd", "-f", "-h", "/etc"]);
    host.ok(&["run", "-d", "--name", "open", "-p", "8089:80", "busybox", "httpd", "-f", "-h", "/etc"]);
    let address = |name: &str| host.ok(&["inspect", "-f", "{{.NetworkSettings.IPAddress}}", name]).trim().to_owned();
    let reaches = |from: &Host, url: &str| from.exec("curl", &["-s", "-m", "2", "-o", "/dev/null", url]).success;
    let url = |port: u16| format!("http://{}:{port}/passwd", host.addr());
    assert!(reaches(host, "http://127.0.0.1:8088/passwd") && reaches(other, &url(8089)));
    let direct = format!("http://{}/passwd", address("own"));
    assert!(other.exec("ip", &["route", "add", "172.17.0.0/16", "via", host.addr()]).success);
    let check = |when: &str| {
        assert!(!reaches(other, &url(8088)), "{when}");
        assert!(!reaches(other, &direct), "a container's own address, {when}");
    };
    check("at first");
    host.kill_daemon();
    check("without a daemon");
    host.start_daemon();
    check("with a new daemon");
    assert!(host.exec("nft", &["flush", "ruleset"]).success);
    // A published port is open all the while, by the process that listens at it; it is the rules that are waited for.
    assert!(reaches(other, &url(8089)));
    wait_until("the rules are back after the firewall's reload", LIMIT, || {
        let rules = host.exec("nft", &["list", "table", "ip", "skep"]).stdout;
        (rules.contains("dport 8089 dnat"), rules)
    });
    assert!(reaches(other, &url(8089)));
    check("after the firewall's reload");
    host.ok(&["rm", "-f", "own", "open"]);
}

/// CVE-2020-13401 and CVE-2024-32473.
#[test]
fn a_network_without_ipv6_has_none() {
    take_turn!();
    let scene = Scene::with_hosts(1);
    let host = scene.host();
    host.ok(&["network", "create", "-d", "bridge", "front"]);
    host.ok(&["run", "-d", "--name", "box", "--network", "front", "busybox", "sleep", "1000"]);
    let inside = host.ok(&["exec", "box", "cat", "/proc/net/if_inet6"]);
    assert!(inside.lines().all(|line| line.ends_with(" lo")), "{inside}");
    let list = host.exec("ip", &["-6", "-o", "addr"]).stdout;
    assert!(!list.contains("br-") && !list.contains("veth"), "{list}");
    host.ok(&["rm", "-f", "box"]);
    host.ok(&["network", "rm", "front"]);
}

/// Asks for a socket of the kernel's ciphers and for one of virtual machines, as a program of 64 bits
/// and as one of 32 would.
const SOCKETS: &str = r#"
#include <stdio.h>
#include <sys/mman.h>
#include <sys/socket.h>
int main(void) {
    int families[] = {38, 40};
    for (int i = 0; i < 2; i++) {
        printf("%d\n", socket(families[i], SOCK_SEQPACKET, 0) >= 0);
        unsigned int *args = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
        args[0] = families[i]; args[1] = SOCK_SEQPACKET; args[2] = 0;
        fflush(stdout);
#ifdef __x86_64__
        long result;
        __asm__ volatile("int $0x80" : "=a"(result) : "a"(102), "b"(1), "c"(args) : "memory", "r8", "r9", "r10", "r11");
        printf("%d\n", (int)result >= 0);
        __asm__ volatile("int $0x80" : "=a"(result) : "a"(359), "b"(families[i]), "c"(SOCK_SEQPACKET), "d"(0) : "memory", "r8", "r9", "r10", "r11");
        printf("%d\n", (int)result >= 0);
#endif
    }
    return 0;
}
"#;

/// CVE-2026-31431.
#[test]
fn sockets_of_the_kernel_s_ciphers_are_refused() {
    take_turn!();
    let scene = Scene::with_hosts(1);
    let host = scene.host();
    let program = scene.compile("sockets", SOCKETS);
    host.import("hostile", &[], |root| {
        fs::copy(&program, root.join("bin/sockets")).unwrap();
    });
    // A kernel without 32-bit programs ends it there.
    let told = host.run(&["run", "--rm", "hostile", "sockets"]).stdout;
    assert!(!told.is_empty() && told.lines().all(|line| line == "0"), "{told}");
}

/// CVE-2022-0492 and CVE-2022-24769.
#[test]
fn a_container_reaches_no_cgroup_but_its_own_and_inherits_nothing() {
    take_turn!();
    let scene = Scene::with_hosts(1);
    let host = scene.host();
    let attempt = "mkdir /tmp/c; mount -t cgroup -o memory none /tmp/c && echo mounted; \
                   unshare -UrmC sh -c 'mount -t cgroup -o rdma none /tmp/c && echo mounted'; \
                   for file in $(find / -name release_agent 2>/dev/null); do echo /evil > $file && echo written $file; done; \
                   for file in notify_on_release memory.limit_in_bytes cgroup.procs devices.allow memory.max; do \
                   find /sys/fs/cgroup -name $file | while read path; do echo 1 > $path && echo written $path; done; done; \
                   true";
    for user in ["0", "1000"] {
        let ran = host.ok(&["run", "--rm", "-u", user, "busybox", "sh", "-c", attempt]);
        assert_eq!(ran, "", "user {user}");
        let sets = host.ok(&["run", "--rm", "-u", user, "busybox", "grep", "-E", "CapInh|CapAmb", "/proc/self/status"]);
        assert!(sets.lines().all(|line| line.ends_with("\t0000000000000000")), "{sets}");
        host.ok(&["run", "-d", "--name", "box", "busybox", "sleep", "1000"]);
        let sets = host.ok(&["exec", "-u", user, "box", "grep", "-E", "CapInh|CapAmb", "/proc/self/status"]);
        assert!(sets.lines().all(|line| line.ends_with("\t0000000000000000")), "exec: {sets}");
        host.ok(&["rm", "-f", "box"]);
    }
}

/// CVE-2021-41091 and CVE-2020-15257.
#[test]
fn users_of_the_host_reach_neither_files_nor_sockets() {
    take_turn!();
    let scene = Scene::with_hosts(1);
    let host = scene.host();
    host.ok(&["run", "-d", "--name", "box", "busybox", "sleep", "1000"]);
    let data = host.data();
    for dir in ["containers", "image", "volumes", "swarm", "tmp"].map(|name| data.join(name)) {
        let list = format!("ls {}", dir.display());
        let ran = host.exec("setpriv", &["--reuid", "65534", "--regid", "65534", "--clear-groups", "sh", "-c", &list]);
        assert!(!ran.success, "{}: {}", dir.display(), ran.stdout);
    }
    let socket = host.socket();
    let mode = fs::metadata(socket.trim_start_matches("unix://")).unwrap().permissions().mode();
    assert_eq!(mode & 0o7, 0, "others may use the socket: {mode:o}");
    // Abstract sockets are reached by who shares the network, whatever its root.
    let sockets = host.ok(&["run", "--rm", "--network", "host", "busybox", "cat", "/proc/net/unix"]);
    assert!(!sockets.contains('@'), "{sockets}");
    host.ok(&["rm", "-f", "box"]);
}

/// Where the host has AppArmor: what a container's capabilities would let it do, and what others' profiles say.
#[test]
fn apparmor_holds_where_capabilities_would_let_go() {
    take_turn!();
    if !fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with('Y')) {
        return skip("this kernel has no AppArmor");
    }
    let scene = Scene::with_hosts(1);
    let host = scene.host();
    let label = ["busybox", "cat", "/proc/self/attr/current"];
    let run = |flags: &[&str], command: &[&str]| host.run(&[&["run", "--rm"], flags, command].concat());
    for (flags, want) in [
        (&[][..], "skep-default (enforce)"),
        (&["--security-opt", "apparmor=docker-default", "--privileged"], "skep-default (enforce)"),
        (&["--security-opt", "no-new-privileges", "--user", "1000"], "skep-default (enforce)"),
        (&["--privileged"], "unconfined"),
        (&["--security-opt", "apparmor=unconfined"], "unconfined"),
    ] {
        let ran = run(flags, &label);
        assert_eq!(ran.stdout.trim(), want, "{flags:?}: {ran:?}");
    }
    let mount = ["busybox", "busybox", "mount", "-t", "tmpfs", "none", "/tmp"];
    let able = ["--cap-add", "SYS_ADMIN"];
    assert!(run(&[&able[..], &["--security-opt", "apparmor=unconfined"]].concat(), &mount).success);
    assert!(!run(&able, &mount).success);
    // As it was mounted, the kernel's own files are out of reach; by AppArmor they are when mounted anew.
    let files = ["--security-opt", "systempaths=unconfined"];
    let write = |to: &str| run(&files, &["busybox", "sh", "-c", &format!("echo 1 > {to}")]).success;
    assert!(!write("/proc/sys/vm/drop_caches") && !write("/proc/sysrq-trigger") && write("/proc/self/oom_score_adj"));
    // One that runs: signals from inside and outside, execs, and what is told of it.
    host.ok(&["run", "-d", "--name", "box", "busybox", "sh", "-c", "trap 'exit 7' TERM; while :; do sleep 1; done"]);
    assert_eq!(host.ok(&["inspect", "--format", "{{.AppArmorProfile}}", "box"]).trim(), "skep-default");
    assert_eq!(host.ok(&[&["exec", "box"], &label[1..]].concat()).trim(), "skep-default (enforce)");
    assert_eq!(host.ok(&[&["exec", "--privileged", "box"], &label[1..]].concat()).trim(), "unconfined");
    host.ok(&["exec", "box", "sh", "-c", "sleep 100 & kill -9 $!; ps; cat /proc/1/environ"]);
    host.ok(&["kill", "--signal", "TERM", "box"]);
    assert_eq!(host.ok(&["wait", "box"]).trim(), "7");
    assert!(host.ok(&["info", "--format", "{{json .SecurityOptions}}"]).contains("name=apparmor"));
    // A profile of the user's; and none of that name.
    let profile = host.dir().join("profile");
    let text = "profile skep-test flags=(attach_disconnected) { file, network, capability, deny /tmp/** w, }\n";
    fs::write(&profile, text).unwrap();
    let profile = profile.display().to_string();
    let own = ["--security-opt", "apparmor=skep-test"];
    let refused = run(&own, &label).stderr;
    assert!(refused.contains("skep-test is not loaded"), "{refused}");
    assert!(host.exec("apparmor_parser", &["-r", &profile]).success);
    let ran = run(&own, &["busybox", "sh", "-c", "cat /proc/self/attr/current; echo 1 > /tmp/x"]);
    assert!(host.exec("apparmor_parser", &["-R", &profile]).success);
    assert!(ran.stdout.starts_with("skep-test (enforce)") && ran.stderr.contains("denied"), "{ran:?}");
    // Torn down by somebody, it is there for the next.
    assert!(host.exec("sh", &["-c", "echo 'profile skep-default {}' | apparmor_parser -R"]).success);
    assert_eq!(run(&[], &label).stdout.trim(), "skep-default (enforce)");
}
