//! A Dockerfile's text as a list of instructions.

use crate::build::words;

/// One instruction, not yet understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub(crate) line: usize,
    /// In capitals.
    pub(crate) name: String,
    /// `--name=value`; no value: empty.
    pub(crate) flags: Vec<(String, String)>,
    pub(crate) rest: String,
    pub(crate) heredocs: Vec<Heredoc>,
}

impl Instruction {
    /// The flags, each with a space behind it.
    pub(crate) fn written_flags(&self) -> String {
        let written = |(name, value): &(String, String)| match value.as_str() {
            "" => format!("--{name} "),
            value => format!("--{name}={value} "),
        };
        self.flags.iter().map(written).collect()
    }
}

/// Text that stands in the Dockerfile itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Heredoc {
    pub(crate) name: String,
    pub(crate) content: String,
    /// Whether variables are put in.
    pub(crate) expands: bool,
}

/// A whole Dockerfile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Dockerfile {
    pub(crate) escape: char,
    pub(crate) instructions: Vec<Instruction>,
}

const NAMES: [&str; 18] = [
    "ADD",
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "LABEL",
    "MAINTAINER",
    "ONBUILD",
    "RUN",
    "SHELL",
    "STOPSIGNAL",
    "USER",
    "VOLUME",
    "WORKDIR",
];

/// Reads a Dockerfile; errors name the line.
pub(crate) fn dockerfile(text: &str) -> Result<Dockerfile, String> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let escape = directive(text, "escape").and_then(|value| value.chars().next()).unwrap_or('\\');
    if !matches!(escape, '\\' | '`') {
        return Err(format!("invalid escape directive {escape:?}: use \\ or `"));
    }
    let mut lines = text.lines().enumerate();
    let mut instructions = Vec::new();
    while let Some((number, first)) = lines.next() {
        let first = first.trim();
        if first.is_empty() || first.starts_with('#') {
            continue;
        }
        let mut whole = String::new();
        let mut line = first.to_owned();
        loop {
            let (piece, goes_on) = match line.trim_end().strip_suffix(escape) {
                Some(piece) => (piece.to_owned(), true),
                None => (line.trim_end().to_owned(), false),
            };
            whole += &piece;
            if !goes_on {
                break;
            }
            // Comments and empty lines in between are passed over.
            let next = lines.by_ref().find(|(_, line)| !line.trim().is_empty() && !line.trim().starts_with('#'));
            match next {
                Some((_, next)) => line = next.to_owned(),
                None => break,
            }
        }
        let mut instruction = instruction(number + 1, &whole)?;
        for (name, expands, strips_tabs) in heredoc_marks(&instruction) {
            let content = heredoc(&mut lines, &name, strips_tabs)
                .ok_or_else(|| format!("line {}: unterminated heredoc {name}", number + 1))?;
            instruction.heredocs.push(Heredoc { name, content, expands });
        }
        instructions.push(instruction);
    }
    if instructions.is_empty() {
        return Err(match text.is_empty() {
            true => "the Dockerfile cannot be empty".into(),
            false => "file with no instructions: the Dockerfile has comments and empty lines alone".into(),
        });
    }
    Ok(Dockerfile { escape, instructions })
}

/// The value of `# name=value` among the comments at the top.
fn directive(text: &str, name: &str) -> Option<String> {
    for line in text.lines() {
        let comment = line.trim().strip_prefix('#')?;
        let (key, value) = comment.split_once('=')?;
        if key.trim().eq_ignore_ascii_case(name) {
            return Some(value.trim().to_owned());
        }
    }
    None
}

/// Reads one line of a Dockerfile.
pub(crate) fn instruction(line: usize, text: &str) -> Result<Instruction, String> {
    let text = text.trim();
    let (name, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let name = name.to_ascii_uppercase();
    if !NAMES.contains(&name.as_str()) {
        return Err(format!("dockerfile parse error on line {line}: unknown instruction: {name}"));
    }
    let mut rest = rest.trim_start();
    let mut flags = Vec::new();
    while let Some(flag) = rest.strip_prefix("--").filter(|_| takes_flags(&name)) {
        let (word, after) = flag.split_once(char::is_whitespace).unwrap_or((flag, ""));
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        flags.push((key.to_owned(), value.to_owned()));
        rest = after.trim_start();
    }
    let may_be_empty = matches!(name.as_str(), "CMD" | "ENTRYPOINT");
    if rest.is_empty() && !may_be_empty {
        return Err(format!("dockerfile parse error on line {line}: {name} requires at least one argument"));
    }
    Ok(Instruction { line, name, flags, rest: rest.to_owned(), heredocs: Vec::new() })
}

fn takes_flags(name: &str) -> bool {
    matches!(name, "FROM" | "RUN" | "COPY" | "ADD" | "HEALTHCHECK")
}

/// The heredocs that an instruction's words announce: name, whether it expands, whether it strips tabs.
fn heredoc_marks(instruction: &Instruction) -> Vec<(String, bool, bool)> {
    if !matches!(instruction.name.as_str(), "RUN" | "COPY" | "ADD") {
        return Vec::new();
    }
    let mark = |word: &String| {
        let (_, rest) = word.split_once("<<")?;
        // A here-string of the shell's is none.
        let rest = (!rest.starts_with('<')).then_some(rest)?;
        let (rest, strips_tabs) = rest.strip_prefix('-').map_or((rest, false), |rest| (rest, true));
        let bare = rest.trim_matches(['"', '\'']);
        let named =
            !bare.is_empty() && bare.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-' || c == '.');
        named.then(|| (bare.to_owned(), bare.len() == rest.len(), strips_tabs))
    };
    words::split(&instruction.rest, '\\').iter().filter_map(mark).collect()
}

fn heredoc<'a>(lines: &mut impl Iterator<Item = (usize, &'a str)>, name: &str, strips_tabs: bool) -> Option<String> {
    let mut content = String::new();
    for (_, line) in lines {
        let line = if strips_tabs { line.trim_start_matches('\t') } else { line };
        if line == name {
            return Some(content);
        }
        content += line;
        content.push('\n');
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> String {
        match dockerfile(text) {
            Ok(file) => {
                file.instructions.iter().map(|i| format!("{} {}", i.name, i.rest)).collect::<Vec<_>>().join("; ")
            }
            Err(error) => error,
        }
    }

    #[test]
    fn lines_are_joined_and_comments_passed_over() {
        assert_eq!(names("# hi\nfrom a\n\nRUN b \\\n # no\n\n  c\n"), "FROM a; RUN b   c");
        assert_eq!(names("# escape=`\nFROM a\nRUN b `\n c\\"), "FROM a; RUN b  c\\");
        assert!(names("FROM a\nRUNN b").contains("line 2: unknown instruction: RUNN"));
        assert!(names("").contains("empty"));
        assert!(names("FROM").contains("FROM requires"));
    }

    #[test]
    fn flags_and_heredocs_are_taken_apart() {
        let file = dockerfile(
            "COPY --from=x --chown=1:2 a b\nRUN <<-EOT\n\techo $hi\n\tEOT\nCOPY <<\"A\" <<B /d\n1\nA\n2\nB\n",
        )
        .unwrap();
        assert_eq!(file.instructions[0].flags, [("from".into(), "x".into()), ("chown".into(), "1:2".into())]);
        assert_eq!(file.instructions[1].heredocs[0].content, "echo $hi\n");
        let [a, b] = file.instructions[2].heredocs.as_slice() else { panic!("two heredocs") };
        assert_eq!((a.content.as_str(), a.expands, b.content.as_str(), b.expands), ("1\n", false, "2\n", true));
        assert!(names("RUN <<EOF\nnever ends").contains("unterminated"));
    }
}
