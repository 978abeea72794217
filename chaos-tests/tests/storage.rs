//! Storage drivers: whatever makes a container's root, it is the same root.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use skep_chaos_tests::{Host, Rig, take_turn};

/// Each line of it is something that a driver could get wrong.
const DOCKERFILE: &str = "\
FROM busybox
RUN mkdir /d /gone /kept && echo one > /d/one && echo two > /d/two && echo x > /gone/x && echo y > /kept/y
RUN ln /d/one /d/again && ln -s one /d/link && mkfifo /d/pipe && chown 5:6 /d/two && chmod 4711 /d/two
RUN rm /d/one && rm -r /gone && rm -r /kept && mkdir /kept && echo z > /kept/z && chmod 700 /d
RUN rm -r /root && ln -s /tmp /root && touch -d '2001-02-03 04:05:06' /kept
";

const LIST: &str = "cd /; for dir in d gone kept root; do find $dir 2>/dev/null; done | sort | \
                    while read file; do if [ -d $file ] && [ ! -L $file ]; then stat -c '%n %F %a %u:%g' $file; \
                    else stat -c '%n %F %a %u:%g %s' $file; fi; done; ls -d gone; cat d/again d/link kept/z 2>&1; true";

fn build(host: &Host) {
    let context = host.dir().join("context");
    std::fs::create_dir_all(&context).unwrap();
    std::fs::write(context.join("Dockerfile"), DOCKERFILE).unwrap();
    host.ok(&["build", "--no-cache", "-t", "layered", context.to_str().unwrap()]);
}

/// What containers see does not tell which driver there is.
fn look(host: &Host) -> Vec<String> {
    host.import_busybox();
    build(host);
    let listed = host.ok(&["run", "--rm", "layered", "sh", "-c", LIST]);
    assert_eq!(host.ok(&["run", "--rm", "layered", "stat", "-c", "%Y", "/kept"]), "981173106\n");
    host.ok(&["run", "-d", "--name", "box", "layered", "sleep", "1000"]);
    let nothing = host.ok(&["diff", "box"]);
    let change = "cd /d && echo more >> /etc/group && chmod 4755 two && rm again && mkdir new && echo new > new/file && ln new/file other && \
                  rm -r /kept && mkdir /kept && echo again > /kept/w && chmod 600 /etc/passwd && rm /bin/yes && \
                  mv /tmp /moved && cd / && mkdir tmp";
    host.ok(&["exec", "box", "sh", "-c", change]);
    let changed = host.ok(&["diff", "box"]);
    // Whether a new directory hides all of the one before, or each of its files is gone, is the same.
    let changed = changed.replace("D /kept/z\n", "");
    // What was written is there after a restart, and in a commit.
    host.ok(&["stop", "-t", "0", "box"]);
    let own = host.dir().join("own");
    std::fs::write(&own, "own").unwrap();
    host.ok(&["cp", own.to_str().unwrap(), "box:/d/own"]);
    host.ok(&["start", "box"]);
    let list = format!(
        "{LIST}; stat -c '%n %a %u:%g %h' d/new/file d/other etc/passwd; tail -n 1 etc/group; ls -d /bin/yes /moved /tmp 2>&1; true"
    );
    let after = host.ok(&["exec", "box", "sh", "-c", &list]);
    host.ok(&["commit", "box", "committed"]);
    let committed = host.ok(&["run", "--rm", "committed", "sh", "-c", &list]);
    assert_eq!(committed, after);
    host.ok(&["rm", "-f", "box"]);
    vec![listed, nothing, changed, after]
}

/// How many entries a directory of the daemon's has, as the host sees it.
fn entries(host: &Host, dir: &str) -> usize {
    let dir = host.data().join(dir);
    let seen = format!("/proc/{}/root{}", host.holder_pid(), dir.display());
    std::fs::read_dir(seen).map_or(0, Iterator::count)
}

fn driver_of(host: &Host, container: &str) -> String {
    host.ok(&["inspect", "-f", "{{.GraphDriver.Name}}", container]).trim().to_owned()
}

/// The same by the driver as by overlayfs, of the same images on the same disk.
fn compare(host: &Host, driver: &str) {
    let by_driver = ["--storage-driver", driver];
    host.start_daemon_with(&by_driver);
    assert_eq!(host.ok(&["info", "--format", "{{.Driver}}"]).trim(), driver);
    let own = look(host);
    assert_eq!(entries(host, "containers"), 0, "nothing is left");
    host.ok(&["run", "-d", "--name", "before", "committed", "sleep", "1000"]);
    assert_eq!(driver_of(host, "before"), driver);
    // Layers made by the one are read by the other; a container stays with what it was made with.
    host.stop_daemon();
    host.start_daemon_with(&["--storage-driver", "overlay2"]);
    let list = |image: &str| host.ok(&["run", "--rm", image, "sh", "-c", LIST]);
    assert_eq!(list("layered"), own[0]);
    host.ok(&["exec", "before", "touch", "/mark"]);
    host.ok(&["restart", "-t", "0", "before"]);
    assert_eq!(host.ok(&["exec", "before", "ls", "/mark"]), "/mark\n");
    assert_eq!(driver_of(host, "before"), driver);
    host.ok(&["rm", "-f", "before"]);
    host.ok(&["rmi", "layered", "committed"]);
    let overlaid = look(host);
    assert_eq!(own, overlaid, "{driver} and overlay2");
    host.ok(&["rmi", "layered", "committed"]);
    host.stop_daemon();
    // With users of their own.
    host.start_daemon_with(&[&by_driver[..], &["--userns-remap", "default"]].concat());
    assert_eq!(look(host), own, "{driver} with mapped users");
    host.ok(&["rmi", "layered", "committed"]);
    host.stop_daemon();
}

#[test]
fn copies_are_as_good_as_overlays() {
    take_turn!();
    let rig = Rig::new(1);
    rig.host(1).own_etc();
    compare(rig.host(1), "vfs");
    let refused = rig.host(1).exec(
        skep_chaos_tests::program().to_str().unwrap(),
        &["daemon", "--data-root", rig.host(1).data().to_str().unwrap(), "--storage-driver", "btrfs"],
    );
    assert!(!refused.success && refused.stderr.contains("not on btrfs"), "{refused:?}");
}

#[test]
fn snapshots_are_as_good_as_overlays() {
    take_turn!();
    let rig = Rig::new(1);
    rig.host(1).own_etc();
    let host = rig.host(1);
    let (data, disk) = (host.data().display().to_string(), host.dir().join("disk").display().to_string());
    let mount =
        format!("mkdir -p {data} && truncate -s 600M {disk} && mkfs.btrfs -q {disk} && mount -o loop {disk} {data}");
    let ran = host.exec("sh", &["-c", &mount]);
    if !ran.success {
        eprintln!("SKIPPED: no btrfs can be mounted from a file here: {}", ran.stderr);
        return;
    }
    compare(host, "btrfs");
    // With the last image goes what it stood on.
    host.start_daemon_with(&["--storage-driver", "btrfs"]);
    host.ok(&["run", "--rm", "busybox", "true"]);
    assert!(entries(host, "image/trees") > 0);
    host.ok(&["image", "prune", "-a", "-f"]);
    assert_eq!(entries(host, "image/trees"), 0);
}

/// Where overlayfs cannot write, as on an overlay, files are copied.
#[test]
fn where_nothing_else_works_files_are_copied() {
    take_turn!();
    let rig = Rig::new(1);
    let host = rig.host(1);
    let (data, below) = (host.data().display().to_string(), host.dir().join("below").display().to_string());
    let mount = format!(
        "mkdir -p {data} {below}/l {below}/u {below}/w && \
         mount -t overlay overlay -o lowerdir={below}/l,upperdir={below}/u,workdir={below}/w {data}"
    );
    assert!(host.exec("sh", &["-c", &mount]).success);
    host.start_daemon();
    assert_eq!(host.ok(&["info", "--format", "{{.Driver}}"]).trim(), "vfs");
    assert!(host.log().contains("overlay2 cannot be used here"));
    host.import_busybox();
    assert_eq!(host.ok(&["run", "--rm", "busybox", "echo", "works"]), "works\n");
    host.stop_daemon();
}
