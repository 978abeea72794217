//! Attacks by images, archives and Dockerfiles: each test tries one that worked somewhere, and sees it
//! fail. The numbers are those of the CVE list.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;

use skep_chaos_tests::{SECRET, Scene, take_turn};

/// CVE-2025-31133: what stands for /dev/null in the image is bound over what is to be masked.
#[test]
fn a_link_in_the_place_of_dev_null_unmasks_nothing() {
    take_turn!();
    let scene = Scene::with_hosts(1);
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
    let scene = Scene::with_hosts(1);
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
    let scene = Scene::with_hosts(1);
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

/// CVE-2019-14271 and CVE-2026-41567.
#[test]
fn copying_runs_nothing_of_the_container() {
    take_turn!();
    let scene = Scene::with_hosts(1);
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
    let scene = Scene::with_hosts(1);
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

/// CVE-2024-23653: a step gains nothing; and what it mounts is never the host's.
#[test]
fn a_build_mounts_nothing_of_the_host_and_gains_nothing() {
    take_turn!();
    let scene = Scene::with_hosts(1);
    let host = scene.host();
    let build = |steps: &str, link: Option<&str>| {
        let context = tempfile::tempdir_in(host.dir()).unwrap();
        fs::write(context.path().join("Dockerfile"), format!("FROM busybox\n{steps}\n")).unwrap();
        link.into_iter().for_each(|to| symlink(to, context.path().join("out")).unwrap());
        host.run(&["build", "--no-cache", "--secret", "id=s,env=PATH", context.path().to_str().unwrap()])
    };
    let up = format!("../../../../../../../..{}", scene.path());
    for (steps, want) in [
        ("RUN --security=insecure touch /made", "--security"),
        ("RUN --mount=type=cache,target=/c,source=../../.. touch /made", "unexpected key 'source'"),
        (&format!("RUN --mount=type=cache,target=/c,from=busybox,source={up} touch /made"), "file does not exist"),
        ("RUN --mount=type=cache,target=/proc touch /made", "/proc"),
        ("RUN --mount=type=secret,id=s,target=/proc/sys/kernel/core_pattern touch /made", "/proc"),
        ("RUN ln -s /proc /p\nRUN --mount=type=secret,id=s,target=/p/cmdline touch /made", "/p"),
        (&format!("RUN --mount=type=bind,source={up},target=/h touch /made"), "No such file"),
    ] {
        let ran = build(steps, None);
        assert!(!ran.success && ran.stderr.contains(want), "{steps}: {ran:?}");
    }
    // The root of the context is all that there is above, also by a link in it.
    for (source, link) in [("/", None), ("../../..", None), ("out", Some("/")), ("out", Some(scene.path().as_str()))] {
        let look =
            format!("RUN --mount=source={source},target=/h ls -R /h; cat /h/secret /h/{}/secret; true", scene.path());
        let ran = build(&look, link);
        assert!(!format!("{ran:?}").contains(SECRET), "{source}: {ran:?}");
    }
    // The name of a cache is no path.
    let named = build(&format!("RUN --mount=type=cache,id={up},target=/c touch /c/made"), None);
    assert!(named.success, "{named:?}");
    let gained = build("RUN grep -h CapEff /proc/self/status; ! mount -t tmpfs x /tmp", None);
    assert!(gained.success, "{gained:?}");
    scene.assert_intact();
}

/// CVE-2024-23652: what was made to mount something on is taken away again, and nothing else, though the step puts a link in
/// its way. CVE-2024-23651: so it is where a cache has such a link in it.
#[test]
fn where_a_step_mounted_something_no_link_leads_out() {
    take_turn!();
    let scene = Scene::with_hosts(1);
    let host = scene.host();
    let empty = host.dir().join("empty");
    fs::create_dir_all(empty.join("dir")).unwrap();
    fs::write(empty.join("file"), "").unwrap();
    let outside = empty.display();
    let context = tempfile::tempdir_in(host.dir()).unwrap();
    let mounts = "--mount=type=tmpfs,target=/x/dir --mount=source=note,target=/x/file";
    let steps = format!(
        "FROM busybox\nRUN {mounts} mv /x /y && ln -s {outside} /x\n\
         RUN --mount=type=cache,target=/c ln -sfn {outside} /c/link\n\
         RUN --mount=type=cache,target=/c --mount=type=tmpfs,target=/c/link/dir true; ls -l /c\n"
    );
    fs::write(context.path().join("Dockerfile"), steps).unwrap();
    fs::write(context.path().join("note"), "here").unwrap();
    // Whether the last step can be done is no matter: it must do nothing outside.
    let ran = host.run(&["build", "-t", "swapped", context.path().to_str().unwrap()]);
    assert!(ran.stdout.contains("Step 4/4"), "the links are in the way: {ran:?}");
    assert!(empty.join("dir").is_dir() && empty.join("file").is_file(), "what is the host's was removed");
    assert_eq!(fs::read_dir(empty.join("dir")).unwrap().count(), 0);
    scene.assert_intact();
}

/// CVE-2022-23648.
#[test]
fn a_volume_s_path_leads_to_the_image_not_to_the_host() {
    take_turn!();
    let scene = Scene::with_hosts(1);
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
    let scene = Scene::with_hosts(1);
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
