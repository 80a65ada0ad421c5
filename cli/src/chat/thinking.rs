//! An answer as templates take it back: what was thought apart from what was said.
//!
//! Templates write earlier turns without what was thought. Most find it in the text, between `<think>` and `</think>`, and many read it
//! from the message too, as `reasoning_content`: there it is given apart, so that a thought which begins in the prompt, or was cut
//! off, is known as one. That of gpt-oss refuses marks of channels in a text and wants what was said alone (what was thought it writes
//! beside calls of tools only; others of its kind write it in place of the text). The rest get the whole text.

/// What a template calls it.
const KEY: &str = "reasoning_content";

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";
const CHANNEL: &str = "<|channel|>";
const MESSAGE: &str = "<|message|>";
/// What ends a message in a channel.
const ENDS: [&str; 4] = ["<|end|>", "<|start|>", "<|call|>", "<|return|>"];
/// The channel of thoughts.
const ANALYSIS: &str = "analysis";

/// What `template` gets of an answer to a prompt that it wrote: the text, and where it reads that apart what was thought.
pub fn parts(template: &str, prompt: &str, answer: String) -> (String, Option<String>) {
    if template.contains(CHANNEL) && answer.contains(CHANNEL) {
        return (said(&answer), None);
    }
    match template.contains(KEY).then(|| split(prompt, &answer)).flatten() {
        Some((thought, text)) => (text, Some(thought)),
        None => (answer, None),
    }
}

/// What was thought and what was said, of an answer that begins with a thought or whose prompt ends in its beginning. Of a thought that was
/// cut off nothing was said.
fn split(prompt: &str, answer: &str) -> Option<(String, String)> {
    let begun = answer.trim_start().strip_prefix(OPEN);
    let thought = begun.or_else(|| prompt.trim_end().ends_with(OPEN).then_some(answer))?;
    let (thought, text) = thought.split_once(CLOSE).unwrap_or((thought, ""));
    Some((thought.trim_matches('\n').into(), text.trim_start_matches('\n').into()))
}

/// Messages in channels that are no thoughts.
fn said(answer: &str) -> String {
    let mut texts = Vec::new();
    for message in answer.split(CHANNEL).skip(1) {
        match message.split_once(MESSAGE) {
            Some((channel, text)) if !channel.trim_start().starts_with(ANALYSIS) => {
                let end = ENDS.iter().filter_map(|end| text.find(end)).min();
                texts.push(&text[..end.unwrap_or(text.len())]);
            }
            _ => (),
        }
    }
    texts.join("\n")
}

#[cfg(test)]
mod tests {
    use super::parts;

    #[test]
    fn thoughts_are_told_from_what_was_said() {
        let (reads, asked) = ("{{ m.reasoning_content }}", "<|user|>a <think> b<|assistant|>");
        let cuts = "{{ m.content.split('</think>')[-1] }}";
        let channels = "{{ '<|channel|>final<|message|>' + m.content }}{{ m.thinking }}";
        for (template, prompt, answer, text, thought) in [
            (reads, asked, "two", "two", None),
            (reads, asked, "two </think> <think>", "two </think> <think>", None),
            (reads, asked, "<think>\nhm\n</think>\n\ntwo", "two", Some("hm")),
            (reads, asked, "\n<think>hm", "", Some("hm")),
            (reads, "a<think>\n", "hm\n</think>\n\ntwo </think>", "two </think>", Some("hm")),
            (reads, "a<think>\n", "hm", "", Some("hm")),
            (reads, "a<think>", "</think>two", "two", Some("")),
            (reads, "a<think>\n\n</think>\n\n", "two", "two", None),
            (reads, asked, "<|channel|>final<|message|>two", "<|channel|>final<|message|>two", None),
            (cuts, asked, "<think>hm</think>two", "<think>hm</think>two", None),
            (cuts, "a<think>", "hm</think>two", "hm</think>two", None),
            (
                channels,
                "<|start|>assistant",
                "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>two",
                "two",
                None,
            ),
            (
                channels,
                "<|start|>assistant",
                "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary to=f \
                 <|constrain|>json<|message|>{}<|call|>",
                "{}",
                None,
            ),
            (channels, "<|start|>assistant", "<|channel|>analysis<|message|>hm", "", None),
            (channels, "<|start|>assistant", "<|channel|>fin", "", None),
            (channels, "<|start|>assistant", "two", "two", None),
        ] {
            let expected = (text.to_owned(), thought.map(str::to_owned));
            assert_eq!(parts(template, prompt, answer.into()), expected, "{prompt:?} {answer:?}");
        }
    }
}
