//! Attacks on the engine of one host: each test tries one that worked somewhere, and sees it fail.
//! The numbers are those of the CVE list.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use skep_chaos_tests::{Host, LIMIT, Rig, take_turn, wait_until};

const SECRET: &str = "of the host alone";

/// A host with something that no container may see or change.
struct Scene {
    rig: Rig,
    outside: PathBuf,
}

impl Scene {
    fn new() -> Self {
        Self::with_hosts(1)
    }

    fn with_hosts(count: u8) -> Self {
        let rig = Rig::new(count);
        rig.host(1).start_daemon();
        rig.host(1).import_busybox();
        let outside = rig.host(1).dir().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), SECRET).unwrap();
        Self { rig, outside }
    }

    fn host(&self) -> &Host {
        self.rig.host(1)
    }

    /// The way to the outside for whoever stands on the host's root.
    fn path(&self) -> String {
        self.outside.display().to_string()
    }

    #[track_caller]
    fn assert_intact(&self) {
        let entries: Vec<_> = fs::read_dir(&self.outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(entries, ["secret"], "something was made outside");
        assert_eq!(fs::read_to_string(self.outside.join("secret")).unwrap(), SECRET);
    }

    /// Builds a program of C for images, linked statically.
    fn compile(&self, name: &str, source: &str) -> PathBuf {
        let (program, text) = (self.host().dir().join(name), self.host().dir().join(format!("{name}.c")));
        fs::write(&text, source).unwrap();
        let made = Command::new("cc").args(["-O1", "-static", "-o"]).arg(&program).arg(&text).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        program
    }

    /// Starts a container that goes on attacking.
    fn attack(&self, flags: &[&str], image: &str, script: &str) {
        self.host().ok(&[&["run", "-d", "--name", "attacker"], flags, &[image, "sh", "-c", script]].concat());
    }
}

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
    let scene = Scene::new();
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
    let scene = Scene::new();
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

/// CVE-2025-31133: what stands for /dev/null in the image is bound over what is to be masked.
#[test]
fn a_link_in_the_place_of_dev_null_unmasks_nothing() {
    take_turn!();
    let scene = Scene::new();
    let host = scene.host();
    let pattern = || fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    let before = pattern();
    let link = |root: &Path| {
        fs::create_dir(root.join("dev")).unwrap();
        symlink("/proc/sys/kernel/core_pattern", root.join("dev/null")).unwrap();
    };
    host.import("hostile", &[], link);
    // The same by a volume, which is filled from the image.
    for flags in [&[][..], &["-v", "devices:/dev"]] {
        let write = "for file in /proc/kcore /proc/keys /proc/timer_list /dev/null /proc/sys/kernel/core_pattern; do \
                     echo '|/evil' > $file; cat $file | head -c 100; done";
        let ran = host.run(&[&["run", "--rm"], flags, &["hostile", "sh", "-c", write]].concat());
        assert!(!ran.stdout.contains("evil"), "{ran:?}");
        assert_eq!(pattern(), before);
    }
    scene.assert_intact();
}

/// CVE-2025-52565 and CVE-2026-41579: links in the places that are filled before the program runs.
#[test]
fn links_in_the_image_lead_no_mount_and_no_device_out() {
    take_turn!();
    let scene = Scene::new();
    let host = scene.host();
    let up = format!("../../../../../../../../..{}", scene.path());
    for (number, place) in
        ["dev", "dev/pts", "dev/console", "dev/shm", "dev/mqueue", "sys", "etc", "tmp/mount"].into_iter().enumerate()
    {
        let image = format!("hostile{number}");
        host.import(&image, &[], |root| {
            let path = root.join(place);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            // Not there in most cases.
            let _ = fs::remove_dir_all(&path);
            symlink(&up, &path).unwrap();
        });
        for flags in [&["-t"][..], &["--tmpfs", "/tmp/mount/x", "-v", "some:/tmp/mount/y"]] {
            let list = "ls / /tmp/mount /dev; cat /etc/secret /tmp/mount/secret /dev/secret";
            let ran = host.run(&[&["run", "--rm"], flags, &[&image, "sh", "-c", list]].concat());
            assert!(!ran.stdout.contains(SECRET), "{place}: {ran:?}");
            scene.assert_intact();
        }
    }
}

/// CVE-2025-52881, CVE-2019-16884, CVE-2023-27561, CVE-2023-28642.
#[test]
fn proc_and_sys_are_never_something_else() {
    take_turn!();
    let scene = Scene::new();
    let host = scene.host();
    for target in ["/proc", "/proc/self/attr", "/proc/sys", "/proc/1", "/tmp/../proc/self"] {
        let volume = format!("fake:{target}");
        for flags in [["-v", &volume], ["--tmpfs", target]] {
            let refused = host.fails(&[&["run", "--rm"], &flags[..], &["busybox", "true"]].concat());
            assert!(refused.contains("/proc"), "{flags:?}: {refused}");
        }
    }
    host.import("declares", &["VOLUME /proc"], |_| ());
    assert!(host.fails(&["run", "--rm", "declares", "true"]).contains("/proc"));
    for place in ["proc", "sys"] {
        host.import("links", &[], |root| {
            fs::create_dir(root.join("elsewhere")).unwrap();
            symlink("/elsewhere", root.join(place)).unwrap();
        });
        let ran = host.run(&["run", "--rm", "links", "sh", "-c", "grep -c . /elsewhere/self/status; ls /elsewhere"]);
        let mounts = host.run(&["run", "--rm", "links", "cat", "/proc/self/mounts"]).stdout;
        assert!(!ran.success || mounts.contains(&format!(" /{place} ")), "{place}: {ran:?}\n{mounts}");
    }
    // A volume that is shared cannot lead writes to it: what is written to is the kernel's.
    let kind =
        host.ok(&["run", "--rm", "-v", "shared:/v", "busybox", "sh", "-c", "stat -f -c %T /proc/self/attr /proc/sys"]);
    assert_eq!(kind, "proc\nproc\n");
}

/// CVE-2021-30465 and CVE-2024-45310.
#[test]
fn swapping_a_mount_point_for_a_link_leads_no_mount_out() {
    take_turn!();
    let scene = Scene::new();
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
    let scene = Scene::new();
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

/// CVE-2019-14271 and CVE-2026-41567.
#[test]
fn copying_runs_nothing_of_the_container() {
    take_turn!();
    let scene = Scene::new();
    let host = scene.host();
    let evil = "#include <fcntl.h>\n__attribute__((constructor)) static void run(void) { open(\"/ran\", O_CREAT | \
                O_WRONLY, 0644); }\n";
    let (source, library) = (host.dir().join("evil.c"), host.dir().join("evil.so"));
    fs::write(&source, evil).unwrap();
    let made = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source).status().unwrap();
    assert!(made.success());
    host.import("hostile", &[], |root| {
        for dir in ["lib", "lib64", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"] {
            fs::create_dir_all(root.join(dir)).unwrap();
            for name in ["libnss_files.so.2", "libnss_compat.so.2", "libnss_dns.so.2", "libgcc_s.so.1", "libc.so.6"] {
                fs::copy(&library, root.join(dir).join(name)).unwrap();
            }
        }
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        for name in ["xz", "unxz", "gzip", "unpigz", "bzip2", "zstd", "tar"] {
            let program = root.join("usr/bin").join(name);
            fs::write(&program, "#!/bin/sh\ntouch /ran\n").unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        }
        fs::write(root.join("etc/nsswitch.conf"), "passwd: files compat dns\n").unwrap();
    });
    host.ok(&["run", "-d", "--name", "box", "hostile", "sleep", "1000"]);
    let out = host.dir().join("out");
    host.ok(&["cp", "box:/etc/passwd", out.to_str().unwrap()]);
    host.ok(&["cp", out.to_str().unwrap(), "box:/tmp/"]);
    // As a client that sends a compressed archive.
    let archive = host.dir().join("archive.tar");
    for (flag, name) in [("-J", "xz"), ("-z", "gzip"), ("-j", "bzip2")] {
        let packed = Command::new("tar").arg(flag).arg("-cf").arg(&archive).args(["-C", "/etc", "hostname"]).status();
        if packed.is_ok_and(|status| status.success()) {
            let target = "http://skep/v1.41/containers/box/archive?path=/tmp";
            let socket = host.socket();
            let sent = ["-s", "--unix-socket", socket.trim_start_matches("unix://"), "-T", archive.to_str().unwrap()];
            let answer = host.exec("curl", &[&sent[..], &[target]].concat());
            assert!(answer.success, "{name}: {answer:?}");
        }
    }
    let found = host.ok(&["exec", "box", "find", "/", "-name", "ran", "-maxdepth", "1"]);
    assert_eq!(found, "", "something of the container ran");
    assert!(!Path::new("/ran").exists());
    host.ok(&["rm", "-f", "box"]);
}

/// Archives that try every way out of the directory they are unpacked in, each its own.
fn hostile_archives(outside: &str) -> Vec<Vec<u8>> {
    use tar::EntryType as Kind;
    let up = format!("../../../../../../../../..{outside}");
    let (by_name, by_root) = (format!("{up}/by-name"), format!("{outside}/by-root"));
    let secret = format!("{up}/secret");
    let ways: [&[(Kind, &str, &str)]; 10] = [
        &[(Kind::Symlink, "soft", &up), (Kind::Regular, "soft/by-soft", "")],
        &[(Kind::Symlink, "soft", &up), (Kind::Directory, "soft/made", "")],
        &[(Kind::Symlink, "soft", &up), (Kind::Regular, "soft/.wh.secret", "")],
        &[(Kind::Symlink, "soft", &up), (Kind::Regular, "soft/.wh..wh..opq", "")],
        &[(Kind::Symlink, "absolute", outside), (Kind::Regular, "absolute/by-absolute", "")],
        &[(Kind::Link, "hard", &secret), (Kind::Regular, "hard", "")],
        &[(Kind::Symlink, "soft", &up), (Kind::Link, "hard", "soft/secret"), (Kind::Regular, "hard", "")],
        &[(Kind::Symlink, "a", "b"), (Kind::Symlink, "b", &up), (Kind::Regular, "a/by-chain", "")],
        &[(Kind::Regular, &by_name, "")],
        &[(Kind::Regular, &by_root, "")],
    ];
    ways.iter().map(|entries| archive_of(entries)).collect()
}

fn archive_of(entries: &[(tar::EntryType, &str, &str)]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (kind, name, link) in entries {
        let mut header = tar::Header::new_gnu();
        let content: &[u8] = if *kind == tar::EntryType::Regular { b"evil" } else { b"" };
        header.set_entry_type(*kind);
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(content.len() as u64);
        // Not by `set_path`, which refuses what is wanted here.
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        archive.append(&header, content).unwrap();
    }
    archive.into_inner().unwrap()
}

/// CVE-2026-17106.
#[test]
fn archives_write_nothing_outside_of_what_they_are_unpacked_in() {
    take_turn!();
    let scene = Scene::new();
    let host = scene.host();
    let path = host.dir().join("hostile.tar");
    let file = path.to_str().unwrap();
    host.ok(&["run", "-d", "--name", "box", "busybox", "sleep", "1000"]);
    let context = host.dir().join("context");
    fs::create_dir(&context).unwrap();
    fs::write(context.join("Dockerfile"), "FROM busybox\nADD hostile.tar /x/\nCOPY hostile.tar /y/\n").unwrap();
    let saved = host.dir().join("saved.tar");
    let socket = host.socket();
    let socket = socket.trim_start_matches("unix://");
    let post = |url: &str, method: &str| {
        let body = format!("@{file}");
        let answer = host.exec(
            "curl",
            &[
                "-s",
                "--unix-socket",
                socket,
                "-X",
                method,
                "--data-binary",
                &body,
                "-H",
                "Content-Type: application/x-tar",
                url,
            ],
        );
        assert!(answer.success, "{answer:?}");
    };
    let ways: [(&str, &dyn Fn()); 6] = [
        ("import", &|| drop(host.run(&["import", file, "evil"]))),
        ("load", &|| drop(host.run(&["load", "-i", saved.to_str().unwrap()]))),
        ("load of what is no image", &|| drop(host.run(&["load", "-i", file]))),
        ("build", &|| drop(host.run(&["build", "-t", "evil", context.to_str().unwrap()]))),
        ("cp", &|| post("http://skep/v1.41/containers/box/archive?path=/tmp", "PUT")),
        ("a build's context", &|| post("http://skep/v1.41/build?t=evil", "POST")),
    ];
    for hostile in hostile_archives(&scene.path()) {
        fs::write(&path, &hostile).unwrap();
        fs::write(context.join("hostile.tar"), &hostile).unwrap();
        fs::write(&saved, image_of_layer(&hostile)).unwrap();
        for (what, run) in ways {
            run();
            let entries = fs::read_dir(&scene.outside).unwrap();
            let entries: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(entries, ["secret"], "{what}");
            scene.assert_intact();
        }
        for image in ["evil", "loaded"] {
            drop(host.run(&["run", "--rm", image, "true"]));
            scene.assert_intact();
        }
    }
    host.ok(&["rm", "-f", "box"]);
}

/// An archive as `save` makes them, with `layer` as its image's one layer.
fn image_of_layer(layer: &[u8]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("layer");
    fs::write(&file, layer).unwrap();
    let sum = Command::new("sha256sum").arg(&file).output().unwrap().stdout;
    let digest = String::from_utf8(sum).unwrap()[..64].to_owned();
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{}},"rootfs":{{"type":"layers","diff_ids":["sha256:{digest}"]}}}}"#
    );
    let manifest = r#"[{"Config":"config.json","RepoTags":["loaded:latest"],"Layers":["layer.tar"]}]"#;
    for (name, bytes) in
        [("config.json", config.as_bytes()), ("layer.tar", layer), ("manifest.json", manifest.as_bytes())]
    {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(bytes.len() as u64);
        archive.append_data(&mut header, name, bytes).unwrap();
    }
    archive.into_inner().unwrap()
}

/// CVE-2024-41110 and CVE-2026-34040: who decides over a request has to see what is done by it.
#[test]
fn a_request_is_what_its_length_says() {
    take_turn!();
    let scene = Scene::new();
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
    host.ok(&["rm", "-f", "own", "open"]);
}

/// CVE-2020-13401 and CVE-2024-32473.
#[test]
fn a_network_without_ipv6_has_none() {
    take_turn!();
    let scene = Scene::new();
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

/// CVE-2024-23651, CVE-2024-23652, CVE-2024-23653: the flags they need are not there.
#[test]
fn a_build_mounts_nothing_and_gains_nothing() {
    take_turn!();
    let scene = Scene::new();
    let host = scene.host();
    for flag in
        ["--mount=type=cache,target=/c,source=../../..", "--mount=type=bind,source=/,target=/h", "--security=insecure"]
    {
        let context = tempfile::tempdir_in(host.dir()).unwrap();
        fs::write(context.path().join("Dockerfile"), format!("FROM busybox\nRUN {flag} touch /made\n")).unwrap();
        let refused = host.fails(&["build", context.path().to_str().unwrap()]);
        assert!(refused.contains(flag.split('=').next().unwrap().trim_start_matches('-')), "{flag}: {refused}");
    }
    let context = tempfile::tempdir_in(host.dir()).unwrap();
    let steps = "FROM busybox\nRUN grep -h CapEff /proc/self/status; ! mount -t tmpfs x /tmp\n";
    fs::write(context.path().join("Dockerfile"), steps).unwrap();
    host.ok(&["build", context.path().to_str().unwrap()]);
    scene.assert_intact();
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
    let scene = Scene::new();
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
    let scene = Scene::new();
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
    let scene = Scene::new();
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

/// CVE-2022-23648.
#[test]
fn a_volume_s_path_leads_to_the_image_not_to_the_host() {
    take_turn!();
    let scene = Scene::new();
    let host = scene.host();
    let up = format!("/../../../../../../../..{}", scene.path());
    host.import("declares", &[&format!("VOLUME {up}")], |_| ());
    host.import("links", &["VOLUME /data"], |root| symlink(&up, root.join("data")).unwrap());
    let look = format!("cat {up}/secret /data/secret; ls -R /data");
    for image in ["declares", "links"] {
        let ran = host.run(&["run", "--rm", image, "sh", "-c", &look]);
        assert!(!ran.stdout.contains(SECRET) && !ran.stdout.contains("secret"), "{image}: {ran:?}");
        scene.assert_intact();
    }
}

/// CVE-2017-14992, and what else is larger than it looks.
#[test]
fn large_input_takes_no_memory_and_odd_numbers_mean_one_thing() {
    take_turn!();
    let scene = Scene::new();
    let host = scene.host();
    let peak_kb = || {
        let status = fs::read_to_string(format!("/proc/{}/status", host.daemon_pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let before = peak_kb();
    // Half a gigabyte of nothing behind an archive's end, a few hundred kilobytes on the wire.
    let bomb = host.dir().join("bomb.tar.gz");
    let script = format!("(tar -C /etc -c hostname; head -c 512M /dev/zero) | gzip -1 > {}", bomb.display());
    assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
    let _ = host.run(&["import", bomb.to_str().unwrap(), "bomb"]);
    let _ = host.run(&["load", "-i", bomb.to_str().unwrap()]);
    host.import("crowd", &[], |root| {
        let line = "x:x:7:\n".repeat(16 << 20);
        fs::write(root.join("etc/group"), line + "wheel:x:77:\n").unwrap();
    });
    let _ = host.run(&["run", "--rm", "-u", "web:wheel", "crowd", "id"]);
    let grown_kb = peak_kb().saturating_sub(before);
    assert!(grown_kb < 100 << 10, "the daemon grew by {grown_kb} kB");

    assert_eq!(host.ok(&["run", "--rm", "-u", "0123", "busybox", "id", "-u"]), "123\n", "as decimal, as in Docker");
    for user in ["4294967296", "-1", "4294967295:0", "0x0"] {
        let refused = host.fails(&["run", "--rm", &format!("--user={user}"), "busybox", "id"]);
        assert!(refused.contains(user.split(':').next().unwrap()), "{refused}");
    }
    let label = format!("run=$(touch {0}/ran)`touch {0}/ran`;touch {0}/ran", scene.path());
    host.ok(&["run", "--rm", "--label", &label, "-e", &label, "--hostname", "h", "busybox", "true"]);
    scene.assert_intact();
}
