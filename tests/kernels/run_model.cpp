// Probabilities of a text, then greedy tokens after its beginning, for test_arm.py, which links it with llama.cpp's library
// for this machine and for ARM. The text goes through the prompt's matrix multiplications, the greedy tokens through dot
// products. Prints the log probability of each token of the text, an empty line, and for each token of the model its number
// and how much its logit is above the second.
// usage: run_model MODEL TEXT_FILE CHUNKS GREEDY_TOKENS

#include "llama.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

static const int CHUNK = 128, PROMPT = 16; // tokens

static void fail(const char * what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

static void decode(llama_context * context, const llama_token * tokens, int n, int position) {
    llama_batch batch = llama_batch_init(n, 0, 1);
    batch.n_tokens = n;
    for (int i = 0; i < n; i++) {
        batch.token[i]     = tokens[i];
        batch.pos[i]       = position + i;
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i]    = 1;
    }
    if (llama_decode(context, batch)) { fail("llama_decode failed"); }
    llama_batch_free(batch);
}

static double log_probability(const float * logits, int n, llama_token token) {
    double sum = 0, highest = logits[0];
    for (int i = 1; i < n; i++) { highest = std::fmax(highest, (double) logits[i]); }
    for (int i = 0; i < n; i++) { sum += std::exp((double) logits[i] - highest); }
    return (double) logits[token] - highest - std::log(sum);
}

int main(int argc, char ** argv) {
    if (argc != 5) { fail("usage: run_model MODEL TEXT_FILE CHUNKS GREEDY_TOKENS"); }
    const int chunks = atoi(argv[3]), greedy = atoi(argv[4]);
    std::stringstream file;
    file << std::ifstream(argv[2]).rdbuf();
    const std::string text = file.str();

    llama_log_set([](ggml_log_level level, const char * message, void *) {
        if (level >= GGML_LOG_LEVEL_WARN) { fputs(message, stderr); }
    }, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) { fail("the model can't be loaded"); }
    const llama_vocab * vocab = llama_model_get_vocab(model);
    const int n_vocab = llama_vocab_n_tokens(vocab);
    llama_context_params parameters = llama_context_default_params();
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = CHUNK;
    parameters.n_threads = parameters.n_threads_batch = 1;
    llama_context * context = llama_init_from_model(model, parameters);
    if (!context) { fail("there is no context"); }

    std::vector<llama_token> tokens(text.size() + 2);
    const int n_tokens = llama_tokenize(vocab, text.c_str(), (int) text.size(), tokens.data(), (int) tokens.size(), false, false);
    if (n_tokens < chunks*CHUNK || n_tokens < PROMPT) { fail("the text is too short"); }

    for (int chunk = 0; chunk < chunks; chunk++) {
        const llama_token * first = tokens.data() + chunk*CHUNK;
        llama_memory_clear(llama_get_memory(context), true);
        decode(context, first, CHUNK, 0);
        for (int i = 0; i + 1 < CHUNK; i++) {
            printf("%.6f\n", log_probability(llama_get_logits_ith(context, i), n_vocab, first[i + 1]));
        }
    }
    printf("\n");

    llama_memory_clear(llama_get_memory(context), true);
    for (int i = 0; i < PROMPT + greedy; i++) {
        if (i >= PROMPT) {
            const float * logits = llama_get_logits_ith(context, 0);
            int best = 0, second = 0;
            for (int t = 1; t < n_vocab; t++) {
                if (logits[t] > logits[best]) {
                    second = best;
                    best   = t;
                } else if (second == best || logits[t] > logits[second]) {
                    second = t;
                }
            }
            printf("%d %.4f\n", best, (double) (logits[best] - logits[second]));
            tokens[i] = best;
        }
        decode(context, &tokens[i], 1, i);
    }
    llama_free(context);
    llama_model_free(model);
    return 0;
}
