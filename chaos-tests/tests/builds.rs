//! Builds of several stages, by `skep` itself.

#![allow(clippy::unwrap_used, reason = "a test fails where it stands")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use skep_chaos_tests::{LIMIT, Rig, program, take_turn, wait_until};

/// A host with busybox, and a build's context of one Dockerfile.
fn scene(dockerfile: &str) -> (Rig, tempfile::TempDir) {
    let rig = Rig::new(1);
    rig.host(1).start_daemon();
    rig.host(1).import_busybox();
    let context = tempfile::tempdir().unwrap();
    std::fs::write(context.path().join("Dockerfile"), dockerfile).unwrap();
    (rig, context)
}

/// The first two stages talk to each other while they are built, and so cannot come one after the other. (The one that
/// listens has no input of its own, at whose end it would hang up before anything is said.)
const TALKING: &str = r#"
FROM busybox AS listens
RUN --network=host timeout 20 nc -l -p 7790 -e tee /heard

FROM busybox AS speaks
RUN --network=host for i in $(seq 100); do echo hello | nc 127.0.0.1 7790 && exit 0; sleep 0.1; done; exit 1

FROM listens AS waits
RUN cat /heard /heard > /twice

FROM busybox
COPY --from=waits /twice /
COPY --from=speaks /etc/passwd /spoken
CMD ["cat", "/twice"]
"#;

#[test]
fn stages_that_do_not_need_each_other_are_built_at_once() {
    take_turn!();
    let (rig, context) = scene(TALKING);
    let host = rig.host(1);
    let told = host.ok(&["build", "-t", "talking", context.path().to_str().unwrap()]);
    assert_eq!(host.ok(&["run", "--rm", "talking"]), "hello\nhello\n");
    let steps: Vec<&str> = told.lines().filter_map(|line| line.split_once("Step ")?.1.split(' ').next()).collect();
    let wanted: Vec<String> = (1..=10).map(|step| format!("{step}/10")).collect();
    assert_eq!(steps, wanted, "steps are told in the order of the file:\n{told}");
    let again = host.ok(&["build", "-t", "again", context.path().to_str().unwrap()]);
    assert_eq!(again.matches("Using cache").count(), 6, "every step but FROM was done before:\n{again}");
}

/// An image of a program alone, as Go's users make them.
#[test]
fn an_image_can_begin_with_nothing() {
    take_turn!();
    let (rig, context) = scene("FROM scratch\nCOPY bin /bin\nWORKDIR /work\nCMD [\"/bin/busybox\", \"ls\", \"/\"]\n");
    std::fs::create_dir(context.path().join("bin")).unwrap();
    std::fs::copy("/bin/busybox", context.path().join("bin/busybox")).unwrap();
    rig.host(1).ok(&["build", "-t", "tiny", context.path().to_str().unwrap()]);
    assert_eq!(rig.host(1).ok(&["run", "--rm", "tiny"]), "bin\ndev\netc\nproc\nsys\nwork\n");
}

#[test]
fn a_stage_that_fails_ends_those_beside_it() {
    take_turn!();
    let (rig, context) = scene(
        "FROM busybox AS slow\nRUN sleep 1000\n\
         FROM busybox AS bad\nRUN sleep 1; echo it breaks; exit 3\n\
         FROM busybox\nCOPY --from=slow / /slow\nCOPY --from=bad / /bad\n",
    );
    let host = rig.host(1);
    let told = host.fails(&["build", context.path().to_str().unwrap()]);
    assert!(told.contains("returned a non-zero code: 3"), "{told}");
    wait_until("its containers are gone", LIMIT, || {
        let list = host.ok(&["ps", "-a", "-q"]);
        (list.is_empty(), list)
    });
}

/// Runs git on this machine, as somebody who has a repository.
fn git(dir: &Path, args: &[&str]) {
    let who = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "init.defaultBranch=main"];
    let done = Command::new("git").arg("-C").arg(dir).args(who).args(args).output();
    let done = done.expect("git is installed (package git)");
    assert!(done.status.success(), "git {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn repositories_are_contexts() {
    take_turn!();
    let (rig, _) = scene("");
    let host = rig.host(1);
    let repository = host.dir().join("served/shop.git");
    std::fs::create_dir_all(repository.join("sub")).unwrap();
    git(&repository, &["init", "--quiet"]);
    let write = |path: &str, text: &str| std::fs::write(repository.join(path), text).unwrap();
    write("Dockerfile", "FROM busybox\nCOPY . /src\n");
    write("sub/Dockerfile", "FROM busybox\nCOPY . /src\nRUN echo old > /age\n");
    std::os::unix::fs::symlink("/etc", repository.join("out")).unwrap();
    git(&repository, &["add", "."]);
    git(&repository, &["commit", "--quiet", "-m", "one"]);
    git(&repository, &["tag", "v1"]);
    write("sub/Dockerfile", "FROM busybox\nRUN echo new > /age\n");
    git(&repository, &["commit", "--quiet", "-a", "-m", "two"]);
    let base = format!("--base-path={}", repository.parent().unwrap().display());
    host.spawn("git", &["daemon", "--export-all", "--reuseaddr", "--listen=10.77.0.1", &base]);
    let url = "git://10.77.0.1/shop.git";
    wait_until("the repository is served", LIMIT, || {
        let ran = host.exec("git", &["ls-remote", url]);
        (ran.success, ran.stderr)
    });
    host.ok(&["build", "-t", "whole", url]);
    // Also by a server of files alone, which has no part of a history.
    git(&repository, &["update-server-info"]);
    let served = repository.parent().unwrap().join("plain");
    std::fs::create_dir(&served).unwrap();
    std::os::unix::fs::symlink(repository.join(".git"), served.join("shop.git")).unwrap();
    host.spawn("busybox", &["httpd", "-f", "-p", "127.0.0.1:8098", "-h", &served.display().to_string()]);
    wait_until("the files are served, and built from", LIMIT, || {
        let built = host.run(&["build", "-t", "plain", "http://127.0.0.1:8098/shop.git#main"]);
        (built.success, built.stderr)
    });
    let files = host.ok(&["run", "--rm", "whole", "ls", "-A", "/src"]);
    assert_eq!(files.split_whitespace().collect::<Vec<_>>(), ["Dockerfile", "out", "sub"], "and no .git");
    let age = |context: &str| {
        host.ok(&["build", "-t", "part", &format!("{url}#{context}")]);
        host.ok(&["run", "--rm", "part", "cat", "/age"])
    };
    assert_eq!([age("v1:sub"), age("main:sub"), age(":sub")], ["old\n", "new\n", "new\n"]);
    for (wrong, why) in [("#none", "none"), ("#:out", "none of the repository's"), ("#--upload-pack=x", "no name")] {
        let refused = host.fails(&["build", &format!("{url}{wrong}")]);
        assert!(refused.contains(why), "{wrong}: {refused}");
    }
    assert_eq!(std::fs::read_dir(host.data().join("tmp")).map_or(0, Iterator::count), 0, "nothing is left");
}

/// Who owns what, and since when, as the Dockerfile and a server say: in the image, and in volumes filled from it.
#[test]
fn owners_modes_and_dates_are_kept() {
    take_turn!();
    let (rig, context) = scene("");
    let host = rig.host(1);
    let served = host.dir().join("served");
    std::fs::create_dir(&served).unwrap();
    std::fs::write(served.join("file"), "served\n").unwrap();
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    std::fs::File::open(served.join("file")).unwrap().set_modified(long_ago).unwrap();
    host.spawn("busybox", &["httpd", "-f", "-p", "127.0.0.1:8099", "-h", &served.display().to_string()]);
    let digest = host.exec("sha256sum", &[&served.join("file").display().to_string()]).stdout;
    let digest = digest.split(' ').next().unwrap();
    let build = |digest: &str| {
        let lines = [
            "FROM busybox",
            "RUN chown 1001:1002 /etc && chmod 0750 /etc",
            "RUN mkdir /full /empty && echo 1 > /full/1 && chown 1003 /full /full/1 /empty && chmod 700 /full /empty",
            "VOLUME /full /empty",
            &format!("ADD --checksum=sha256:{digest} http://127.0.0.1:8099/file /got/"),
            "CMD stat -c '%u:%g %a %n' /etc /full /full/1 /empty /got/file && stat -c %Y /got/file",
        ];
        std::fs::write(context.path().join("Dockerfile"), lines.join("\n")).unwrap();
        host.run(&["build", "-t", "kept", context.path().to_str().unwrap()])
    };
    wait_until("the file is served, and added", LIMIT, || {
        let built = build(digest);
        (built.success, built.stderr)
    });
    let want =
        "1001:1002 750 /etc\n1003:0 700 /full\n1003:0 644 /full/1\n1003:0 700 /empty\n0:0 600 /got/file\n1000000000\n";
    assert_eq!(host.ok(&["run", "--rm", "kept"]), want);
    let other = build(&"0".repeat(64));
    assert!(!other.success && other.stderr.contains("digest mismatch"), "{}", other.stderr);
}

/// As those do who copy the lists of what they need first, from wherever in the tree.
#[test]
fn files_are_copied_with_their_directories_and_without_what_is_not_wanted() {
    take_turn!();
    let lines = [
        "FROM busybox",
        "COPY --parents --exclude=**/old src/./**/package.json /lists/",
        "COPY --exclude=*.md --chmod=u=rwX,go=rX --parents=false src /all",
        "CMD cd /lists && find . -type f | sort && cd /all && find . -type f -exec stat -c '%a %n' {} + | sort",
    ];
    let (rig, context) = scene(&lines.join("\n"));
    let host = rig.host(1);
    for (path, mode) in [("src/a/package.json", 0o600), ("src/b/c/package.json", 0o600), ("src/run", 0o700)] {
        let path = context.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "{}").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    std::fs::write(context.path().join("src/README.md"), "read").unwrap();
    let build = || host.ok(&["build", "-t", "copied", context.path().to_str().unwrap()]);
    build();
    let want = "./a/package.json\n./b/c/package.json\n644 ./a/package.json\n644 ./b/c/package.json\n755 ./run\n";
    assert_eq!(host.ok(&["run", "--rm", "copied"]), want);
    // What is not copied does not count.
    std::fs::write(context.path().join("src/README.md"), "read again").unwrap();
    let again = build();
    assert_eq!(again.matches("Using cache").count(), 3, "{again}");
    let wrong = lines.join("\n").replace("u=rwX", "u=rwq");
    std::fs::write(context.path().join("Dockerfile"), wrong).unwrap();
    let refused = host.fails(&["build", context.path().to_str().unwrap()]);
    assert!(refused.contains("line 3") && refused.contains("no mode"), "{refused}");
}

const MOUNTED: &str = r#"
FROM busybox AS tools
RUN mkdir /opt && echo tool > /opt/tool

FROM busybox
RUN --mount=type=cache,target=/root/.cache/steps echo step >> /root/.cache/steps/log && wc -l < /root/.cache/steps/log > /count
RUN --mount=source=note,target=/mnt/note --mount=from=tools,source=/opt,target=/mnt/opt \
    cat /mnt/note /mnt/opt/tool > /both && ! touch /mnt/opt/new
RUN --mount=source=note,target=/mnt/note,rw echo more >> /mnt/note && cat /mnt/note > /more
RUN --mount=type=tmpfs,target=/scratch,size=1m grep /scratch /proc/mounts > /seen && touch /scratch/file
RUN --mount=type=secret,id=pass,mode=0440 --mount=type=secret,id=word,env=WORD --mount=type=ssh \
    stat -c %a /run/secrets/pass > /told && cat /run/secrets/pass >> /told && echo $WORD >> /told
"#;

/// Steps see what they mount, and the image has nothing of it.
fn check_mounts(flags: &[&str]) {
    let rig = Rig::new(1);
    let host = rig.host(1);
    host.start_daemon_with(flags);
    host.import_busybox();
    let context = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(context.path().join(name), text).unwrap();
    write("Dockerfile", MOUNTED);
    write("note", "from the context\n");
    write("pass", "hush");
    let (dir, pass) = (context.path().display().to_string(), format!("id=pass,src={}/pass", context.path().display()));
    let secrets = ["--secret", &pass, "--secret", "id=word,env=PATH"];
    let build = |more: &[&str]| host.ok(&[&["build", "-t", "mounted"], &secrets[..], more, &[&dir]].concat());
    let read = |file: &str| host.ok(&["run", "--rm", "mounted", "cat", file]);
    build(&[]);
    assert_eq!(read("/count").trim(), "1", "{flags:?}");
    assert_eq!(read("/both"), "from the context\ntool\n");
    assert_eq!(read("/more"), "from the context\nmore\n");
    assert_eq!(std::fs::read_to_string(context.path().join("note")).unwrap(), "from the context\n");
    assert!(read("/seen").contains("tmpfs"));
    let path = std::env::var("PATH").unwrap();
    assert_eq!(read("/told"), format!("440\nhush{path}\n"));
    let left = host.ok(&["run", "--rm", "mounted", "sh", "-c", "ls -d /root/.cache /mnt /scratch /run/secrets; true"]);
    assert_eq!(left, "", "where something was mounted");
    // What is bound counts for the cache of steps; what caches hold does not, and stays from build to build.
    assert_eq!(build(&[]).matches("Using cache").count(), 6, "{flags:?}");
    write("note", "changed\n");
    assert_eq!(build(&[]).matches("Using cache").count(), 2, "up to the step that binds it");
    assert_eq!(read("/both"), "changed\ntool\n");
    host.kill_daemon();
    host.start_daemon_with(flags);
    build(&["--no-cache"]);
    assert_eq!(read("/count").trim(), "2");
    assert!(host.ok(&["system", "df"]).lines().any(|line| line.starts_with("Build Cache") && line.contains(" 1 ")));
    host.ok(&["builder", "prune", "-f"]);
    build(&["--no-cache"]);
    assert_eq!(read("/count").trim(), "1", "the cache is gone");
}

#[test]
fn steps_mount_what_no_layer_has() {
    take_turn!();
    check_mounts(&[]);
    check_mounts(&["--userns-remap", "default"]);
    check_mounts(&["--storage-driver", "vfs"]);
}

const SEEDED: &str = r#"
FROM busybox AS seeds
RUN mkdir /seeds && echo seed > /seeds/one

FROM busybox
ARG WHO=bees
RUN --mount=type=cache,target=/cache,from=seeds,source=/seeds cp /cache/one /first && echo $WHO >> /cache/one
CMD ["cat", "/first"]
"#;

/// A cache that begins with something is another one once that is something else; and history tells a step's arguments.
#[test]
fn caches_begin_with_what_they_are_given() {
    take_turn!();
    let (rig, context) = scene(SEEDED);
    let host = rig.host(1);
    let build = |lines: &str, who: &str| {
        std::fs::write(context.path().join("Dockerfile"), lines).unwrap();
        let who = format!("WHO={who}");
        host.ok(&["build", "--build-arg", &who, "-t", "seeded", context.path().to_str().unwrap()]);
        host.ok(&["run", "--rm", "seeded"])
    };
    assert_eq!(build(SEEDED, "bees"), "seed\n");
    assert_eq!(build(SEEDED, "ants"), "seed\nbees\n", "it is kept");
    assert_eq!(build(&SEEDED.replace("echo seed", "echo other"), "bees"), "other\n");
    let steps = host.ok(&["history", "--no-trunc", "--format", "{{.CreatedBy}}", "seeded"]);
    assert!(steps.contains("|1 WHO=bees /bin/sh -c cp /cache/one"), "{steps}");
}

#[test]
fn mounts_that_cannot_be_are_refused_by_name() {
    take_turn!();
    for (mount, want) in [
        ("type=secret,id=pass,required", "secret pass: not found: give it by --secret id=pass,src=FILE"),
        ("type=ssh,required", "SSH agent default: not found"),
        ("type=bind,source=absent,target=/mnt", "absent"),
        ("type=volume,target=/mnt", "unsupported mount type \"volume\""),
        ("type=bind,source=../../etc,target=/mnt", "etc"),
    ] {
        let (rig, context) = scene(&format!("FROM busybox\nRUN --mount={mount} cat /mnt/passwd\n"));
        let why = rig.host(1).fails(&["build", context.path().to_str().unwrap()]);
        assert!(why.contains(want), "{mount}: {why}");
    }
}

/// The same cache twice in one step, and two by two stages at once in another order: nobody waits for ever.
const LOCKED: &str = r#"
FROM busybox AS one
RUN --mount=type=cache,id=x,target=/x,sharing=locked --mount=type=cache,id=y,target=/y,sharing=locked \
    --mount=type=cache,id=x,target=/z,sharing=locked touch /x/one && sleep 0.3 && test -e /z/one

FROM busybox AS two
RUN --mount=type=cache,id=y,target=/y,sharing=locked --mount=type=cache,id=x,target=/x,sharing=locked sleep 0.3

FROM busybox
COPY --from=one /bin/busybox /one
COPY --from=two /bin/busybox /two
"#;

#[test]
fn steps_that_want_caches_for_themselves_do_not_wait_for_ever() {
    take_turn!();
    let (rig, context) = scene(LOCKED);
    let host = rig.host(1);
    let (skep, dir) = (program().display().to_string(), context.path().display().to_string());
    let ran = host.exec("timeout", &["60", &skep, "-H", &host.socket(), "build", &dir]);
    assert!(ran.success, "{ran:?}");
}
