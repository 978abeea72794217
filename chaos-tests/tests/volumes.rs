//! What containers have mounted beside their own files: directories of the host by way of volumes, and images.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use skep_chaos_tests::{Host, Rig, take_turn};

/// Builds an image upon busybox.
fn build(host: &Host, name: &str, lines: &str) {
    let context = host.dir().join("context");
    std::fs::create_dir_all(&context).unwrap();
    std::fs::write(context.join("Dockerfile"), format!("FROM busybox\n{lines}")).unwrap();
    host.ok(&["build", "-t", name, context.to_str().unwrap()]);
}

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

/// Containers that are only made for their volumes, and never run.
#[test]
fn volumes_are_filled_when_their_container_is_made() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.own_etc();
    for flags in [&[][..], &["--userns-remap", "default"], &["--storage-driver", "vfs"]] {
        host.start_daemon_with(flags);
        host.import_busybox();
        let run = "mkdir /data /other && echo kept | tee /data/kept > /other/kept && ln -s other /led";
        build(host, "data", &format!("RUN {run}\nVOLUME /data\n"));
        host.ok(&["create", "--name", "holds", "-v", "named:/data", "data", "true"]);
        assert_eq!(host.ok(&["run", "--rm", "--volumes-from", "holds", "busybox", "cat", "/data/kept"]), "kept\n");
        // What is copied in before the first start comes beside what the image has.
        let file = host.dir().join("mine");
        std::fs::write(&file, "mine").unwrap();
        host.ok(&["create", "--name", "copied", "-v", "more:/led", "data", "cat", "/led/kept", "/led/mine"]);
        host.ok(&["cp", file.to_str().unwrap(), "copied:/led/mine"]);
        assert_eq!(host.ok(&["start", "-a", "copied"]), "kept\nmine", "{flags:?}");
        host.ok(&[
            "create",
            "--name",
            "bare",
            "--mount",
            "type=volume,src=bare,dst=/data,volume-nocopy",
            "data",
            "true",
        ]);
        assert_eq!(host.ok(&["run", "--rm", "-v", "bare:/bare", "busybox", "ls", "/bare"]), "");
        let mounts = host.exec("cat", &["/proc/self/mountinfo"]).stdout;
        let own = host.data().join("containers").display().to_string();
        assert!(!mounts.lines().any(|line| line.contains(&own) && line.contains("/rootfs")), "{mounts}");
        host.ok(&["rm", "-v", "holds", "copied", "bare"]);
        host.ok(&["volume", "rm", "named", "more", "bare"]);
        host.stop_daemon();
    }
}

/// An image beside the container's own: all of it or a part, with what the container writes there its own until it is removed.
#[test]
fn the_files_of_an_image_are_mounted_beside_the_container_s_own() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.own_etc();
    for flags in [&[][..], &["--userns-remap", "default"], &["--storage-driver", "vfs"]] {
        host.start_daemon_with(flags);
        host.import_busybox();
        build(host, "tools", "RUN mkdir -p /opt/deep && echo tool > /opt/deep/tool && ln -s /etc /opt/out\n");
        let mount = |more: &str| format!("type=image,source=tools,target=/tools{more}");
        let run = |more: &str, script: &str| {
            host.run(&["run", "--rm", "--mount", &mount(more), "busybox", "sh", "-c", script])
        };
        assert_eq!(run("", "cat /tools/opt/deep/tool && ls / | grep -c opt").stdout, "tool\n0\n");
        assert_eq!(run(",image-subpath=opt/deep", "ls /tools").stdout, "tool\n");
        assert!(run(",image-subpath=nowhere", "true").stderr.contains("cannot access path nowhere of image tools"));
        // A link in it leads within it.
        assert!(run(",image-subpath=opt/out", "ls /tools").stdout.contains("passwd"));
        assert!(run(",image-subpath=../..", "true").stderr.contains("relative path"));
        assert!(run(",readonly", "touch /tools/new").stderr.contains("Read-only"));

        let kept = mount("");
        host.ok(&["run", "-d", "--name", "keeps", "--mount", &kept, "busybox", "sleep", "1000"]);
        host.ok(&["exec", "keeps", "sh", "-c", "echo mine > /tools/mine; rm /tools/opt/deep/tool"]);
        assert!(host.fails(&["rmi", "tools"]).contains("using"), "{flags:?}");
        let id = host.ok(&["image", "inspect", "-f", "{{.Id}}", "tools"]);
        assert!(host.fails(&["rmi", "-f", id.trim()]).contains("running container"), "{flags:?}");
        host.kill_daemon();
        host.start_daemon_with(flags);
        host.ok(&["restart", "-t", "0", "keeps"]);
        assert_eq!(host.ok(&["exec", "keeps", "sh", "-c", "cat /tools/mine; ls /tools/opt/deep"]), "mine\n");
        let told =
            host.ok(&["inspect", "-f", "{{range .Mounts}}{{.Type}} {{.Source}} {{.Destination}}{{end}}", "keeps"]);
        assert_eq!(told.trim(), "image tools /tools");
        host.ok(&["stop", "-t", "0", "keeps"]);
        host.ok(&["rmi", "-f", "tools"]);
        host.ok(&["start", "keeps"]);
        assert_eq!(
            host.ok(&["exec", "keeps", "sh", "-c", "cat /tools/mine; ls /tools/bin/sh"]),
            "mine\n/tools/bin/sh\n"
        );
        host.ok(&["stop", "-t", "0", "keeps"]);
        assert!(host.exec("sh", &["-c", "grep -c /mounts/ /proc/self/mountinfo"]).stdout.starts_with('0'));
        let copied = host.dir().join("copied");
        host.ok(&["cp", "keeps:/tools/mine", copied.to_str().unwrap()]);
        assert_eq!(std::fs::read_to_string(copied).unwrap(), "mine\n");
        host.ok(&["rm", "keeps"]);
        assert!(host.fails(&["create", "--mount", &kept, "busybox", "true"]).contains("tools"));
        assert!(host.exec("sh", &["-c", "grep -c /mounts/ /proc/self/mountinfo"]).stdout.starts_with('0'));
        host.stop_daemon();
    }
}
