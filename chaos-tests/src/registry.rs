//! A real registry on a host.

use std::fs;

use crate::{Host, LIMIT, wait_until};

impl Host {
    /// Runs Debian's docker-registry on the first host, at 10.77.0.1:5000, until the rig is gone.
    pub fn start_registry(&self) {
        let dir = self.dir().join("registry");
        fs::create_dir_all(&dir).expect("the host's directory takes files");
        let config = dir.join("config.yml");
        let text = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 10.77.0.1:5000\n",
            dir.join("data").display()
        );
        fs::write(&config, text).expect("the host's directory takes files");
        self.spawn("docker-registry", &["serve", &config.display().to_string()]);
        wait_until("the registry answers", LIMIT, || {
            let ran = self.exec("curl", &["-s", "-m", "2", "http://10.77.0.1:5000/v2/"]);
            (ran.success, format!("{ran:?}"))
        });
    }
}
