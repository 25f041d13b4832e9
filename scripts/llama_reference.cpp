// What does llama.cpp compute for these tokens?
//
// A thin program over the public C interface of llama.cpp (llama.h), compiled by llama_reference.py against a
// built llama.cpp. It reads one request a line from stdin and answers each with one line of JSON on stdout:
//
//   tokens PATH             ids of the file's text
//   score  N PATH           ids of the first N tokens of the file; for each but the last, log-probability of the
//                           token that follows and the most probable id; all in batches of n_batch from an empty cache
//   greedy N PATH           the N most probable tokens one after another from the file's text; at each step the two
//                           most probable ids with their log-probabilities; stops after an end-of-generation token
//   ask    N PATH           as greedy, but keeps the longest prefix shared with the previous `ask` in the cache
//
// No BOS is added and special tokens in the text are recognized. Log-probabilities are natural logarithms, summed in
// double from llama.cpp's f32 logits.
//
// usage: llama_reference MODEL N_CTX N_BATCH FLASH(0|1) THREADS REPACK(0|1)

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

using Tokens = std::vector<llama_token>;

struct Top2 {
    llama_token id[2];
    double logprob[2];
};

[[noreturn]] static void fail(const std::string & why) {
    fprintf(stderr, "llama_reference: %s\n", why.c_str());
    exit(1);
}

static void warnings(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_WARN || level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static std::string read_text(const std::string & path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) fail("cannot read " + path);
    std::stringstream text;
    text << in.rdbuf();
    return text.str();
}

static Tokens tokenize(const llama_vocab * vocab, const std::string & text) {
    Tokens ids(text.size() + 8);
    int n = llama_tokenize(vocab, text.data(), (int) text.size(), ids.data(), (int) ids.size(), false, true);
    if (n < 0) fail("tokenize");
    ids.resize(n);
    return ids;
}

static double log_sum_exp(const float * logits, int vocab) {
    float max = *std::max_element(logits, logits + vocab);
    double sum = 0;
    for (int i = 0; i < vocab; i++) sum += std::exp((double) logits[i] - max);
    return max + std::log(sum);
}

static Top2 top2(const float * logits, int vocab) {
    int a = logits[0] >= logits[1] ? 0 : 1, b = 1 - a;
    for (int i = 2; i < vocab; i++) {
        if (logits[i] > logits[a]) { b = a; a = i; }
        else if (logits[i] > logits[b]) b = i;
    }
    double all = log_sum_exp(logits, vocab);
    return {{a, b}, {logits[a] - all, logits[b] - all}};
}

/// Feeds tokens[from..to) at their positions; logits of all of them (one batch) or of the last alone.
static void feed(llama_context * ctx, const Tokens & tokens, int from, int to, bool all_logits) {
    llama_batch batch = llama_batch_init(to - from, 0, 1);
    batch.n_tokens = to - from;
    for (int i = from; i < to; i++) {
        batch.token[i - from] = tokens[i];
        batch.pos[i - from] = i;
        batch.n_seq_id[i - from] = 1;
        batch.seq_id[i - from][0] = 0;
        batch.logits[i - from] = all_logits || i + 1 == to;
    }
    int status = llama_decode(ctx, batch);
    llama_batch_free(batch);
    if (status != 0) fail("llama_decode gave " + std::to_string(status));
}

static void print_ids(const char * name, const Tokens & ids) {
    printf("\"%s\":[", name);
    for (size_t i = 0; i < ids.size(); i++) printf(i ? ",%d" : "%d", ids[i]);
    printf("]");
}

static void score(llama_context * ctx, int vocab, int n_batch, const Tokens & ids) {
    std::vector<double> logprobs;
    Tokens top1;
    for (int from = 0; from < (int) ids.size(); from += n_batch) {
        int to = std::min<int>(from + n_batch, ids.size());
        feed(ctx, ids, from, to, true);
        for (int i = from; i < to && i + 1 < (int) ids.size(); i++) {
            const float * logits = llama_get_logits_ith(ctx, i - from);
            logprobs.push_back(logits[ids[i + 1]] - log_sum_exp(logits, vocab));
            top1.push_back((llama_token) (std::max_element(logits, logits + vocab) - logits));
        }
    }
    printf("{");
    print_ids("ids", ids);
    printf(",\"logprobs\":[");
    for (size_t i = 0; i < logprobs.size(); i++) printf(i ? ",%.9g" : "%.9g", logprobs[i]);
    printf("],");
    print_ids("top1", top1);
    printf("}\n");
}

static void greedy(llama_context * ctx, const llama_vocab * voc, int n_batch, int n, const Tokens & prompt, int cached) {
    int vocab = llama_vocab_n_tokens(voc);
    for (int from = cached; from < (int) prompt.size(); from += n_batch)
        feed(ctx, prompt, from, std::min<int>(from + n_batch, prompt.size()), false);
    Tokens all = prompt, continuation;
    std::vector<Top2> steps;
    for (int i = 0; i < n; i++) {
        steps.push_back(top2(llama_get_logits_ith(ctx, -1), vocab));
        llama_token id = steps.back().id[0];
        continuation.push_back(id);
        all.push_back(id);
        if (llama_vocab_is_eog(voc, id) || i + 1 == n) break;
        feed(ctx, all, (int) all.size() - 1, (int) all.size(), false);
    }
    printf("{");
    print_ids("prompt", prompt);
    printf(",");
    print_ids("continuation", continuation);
    printf(",\"top2\":[");
    for (size_t i = 0; i < steps.size(); i++) {
        const Top2 & s = steps[i];
        printf("%s[%d,%.9g,%d,%.9g]", i ? "," : "", s.id[0], s.logprob[0], s.id[1], s.logprob[1]);
    }
    std::vector<char> text(16 * continuation.size() + 64);
    int bytes = llama_detokenize(voc, continuation.data(), continuation.size(), text.data(), text.size(), false, true);
    printf("],\"text_hex\":\"");
    for (int i = 0; i < bytes; i++) printf("%02x", (unsigned char) text[i]);
    printf("\"}\n");
}

/// Length of the common prefix, but never all of `ids`: the last token's logits must be computed.
static size_t shared_prefix(const Tokens & cached, const Tokens & ids) {
    size_t keep = 0;
    while (keep < cached.size() && keep + 1 < ids.size() && cached[keep] == ids[keep]) keep++;
    return keep;
}

int main(int argc, char ** argv) {
    if (argc != 7) fail("usage: llama_reference MODEL N_CTX N_BATCH FLASH THREADS REPACK");
    llama_log_set(warnings, nullptr);
    llama_backend_init();
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers = 0;
    model_params.use_extra_bufts = atoi(argv[6]) != 0;
    llama_model * model = llama_model_load_from_file(argv[1], model_params);
    if (!model) fail(std::string("cannot load ") + argv[1]);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = atoi(argv[2]);
    params.n_batch = params.n_ubatch = atoi(argv[3]);
    params.flash_attn_type = atoi(argv[4]) ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.n_threads = params.n_threads_batch = atoi(argv[5]);
    params.type_k = params.type_v = GGML_TYPE_F16;
    llama_context * ctx = llama_init_from_model(model, params);
    if (!ctx) fail("no context");
    const llama_vocab * vocab = llama_model_get_vocab(model);
    printf("{\"system\":\"%s\"}\n", llama_print_system_info());
    fflush(stdout);

    Tokens cached;
    std::string line;
    while (std::getline(std::cin, line)) {
        std::istringstream words(line);
        std::string verb, path;
        int n = 0;
        words >> verb;
        if (verb != "tokens") words >> n;
        std::getline(words >> std::ws, path);
        Tokens ids = tokenize(vocab, read_text(path));
        size_t keep = 0;
        if (verb == "ask") keep = shared_prefix(cached, ids);
        cached = verb == "ask" ? ids : Tokens();
        llama_memory_seq_rm(llama_get_memory(ctx), 0, (llama_pos) keep, -1);
        if (verb == "tokens") {
            printf("{");
            print_ids("ids", ids);
            printf("}\n");
        } else if (verb == "score") {
            ids.resize(std::min<size_t>(ids.size(), n));
            score(ctx, llama_vocab_n_tokens(vocab), params.n_batch, ids);
        } else if (verb == "greedy" || verb == "ask") {
            greedy(ctx, vocab, params.n_batch, n, ids, (int) keep);
        } else fail("unknown request: " + line);
        fflush(stdout);
    }
    return 0;
}
