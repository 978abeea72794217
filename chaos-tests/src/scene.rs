//! Where attacks are tried: a host with something that containers must not reach.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::{Host, Rig};

/// What the host has that no container may see.
pub const SECRET: &str = "of the host alone";

/// A host with something that no container may see or change.
#[derive(Debug)]
pub struct Scene {
    pub rig: Rig,
    /// A directory of the host's with nothing but a file `secret` in it.
    pub outside: PathBuf,
}

impl Scene {
    /// On the first of so many hosts.
    #[must_use]
    pub fn with_hosts(count: u8) -> Self {
        let rig = Rig::new(count);
        rig.host(1).start_daemon();
        rig.host(1).import_busybox();
        let outside = rig.host(1).dir().join("outside");
        fs::create_dir(&outside).expect("the machine does what tests need");
        fs::write(outside.join("secret"), SECRET).expect("the machine does what tests need");
        Self { rig, outside }
    }

    #[must_use]
    pub fn host(&self) -> &Host {
        self.rig.host(1)
    }

    /// The way to the outside for whoever stands on the host's root.
    #[must_use]
    pub fn path(&self) -> String {
        self.outside.display().to_string()
    }

    /// Fails unless everything outside is as it was.
    #[track_caller]
    pub fn assert_intact(&self) {
        let entries: Vec<_> = fs::read_dir(&self.outside)
            .expect("the machine does what tests need")
            .map(|entry| entry.expect("the machine does what tests need").file_name())
            .collect();
        assert_eq!(entries, ["secret"], "something was made outside");
        assert_eq!(fs::read_to_string(self.outside.join("secret")).expect("the machine does what tests need"), SECRET);
    }

    /// Builds a program of C for images, linked statically.
    #[must_use]
    pub fn compile(&self, name: &str, source: &str) -> PathBuf {
        let (program, text) = (self.host().dir().join(name), self.host().dir().join(format!("{name}.c")));
        fs::write(&text, source).expect("the machine does what tests need");
        let made = Command::new("cc")
            .args(["-O1", "-static", "-o"])
            .arg(&program)
            .arg(&text)
            .output()
            .expect("the machine does what tests need");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        program
    }

    /// Starts a container that goes on attacking.
    pub fn attack(&self, flags: &[&str], image: &str, script: &str) {
        self.host().ok(&[&["run", "-d", "--name", "attacker"], flags, &[image, "sh", "-c", script]].concat());
    }
}
