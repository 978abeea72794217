//! Images to try things with, made of files on this machine.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Host;

impl Host {
    /// An image of busybox with a user beside root.
    pub fn import_busybox(&self) {
        self.import("busybox", &[], |_| ());
    }

    /// An image of busybox and what `add` puts beside it, with `changes` as in a Dockerfile.
    #[track_caller]
    pub fn import(&self, name: &str, changes: &[&str], add: impl FnOnce(&Path)) {
        let dir = tempfile::tempdir_in(self.dir()).expect("the host has a directory");
        let root = dir.path().join("root");
        lay_out_busybox(&root);
        add(&root);
        let archive = dir.path().join("root.tar");
        let packed = Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(&archive).arg(".").status();
        assert!(packed.expect("tar runs").success(), "{name} cannot be packed");
        let mut args = vec!["import"];
        changes.iter().for_each(|change| args.extend(["--change", change]));
        let archive = archive.display().to_string();
        args.extend([archive.as_str(), name]);
        self.ok(&args);
    }
}

/// Where this machine has the program.
fn busybox() -> PathBuf {
    let places = ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from);
    places.into_iter().find(|path| path.exists()).expect("busybox is installed (package busybox-static)")
}

fn lay_out_busybox(root: &Path) {
    let write = |path: &str, text: &str| fs::write(root.join(path), text).expect("the directory takes files");
    for dir in ["bin", "etc", "tmp", "root"] {
        fs::create_dir_all(root.join(dir)).expect("the directory takes more");
    }
    let program = busybox();
    fs::copy(&program, root.join("bin/busybox")).expect("busybox can be copied");
    let applets = Command::new(&program).arg("--list").output().expect("busybox runs").stdout;
    for applet in String::from_utf8_lossy(&applets).lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", root.join("bin").join(applet)).expect("the directory takes links");
    }
    write("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n");
    write("etc/group", "root:x:0:\nweb:x:1000:\n");
}
