// Attention with shared maps as operators of OpenVINO, by the kernels in C.
//
// Tensors have the shape (batch, positions, heads, dim), the order of the linear layers around attention. Maps have the
// shape (batch, heads, queries, keys). A map in 8 bits has keys up to a multiple of 64, and a scale per row.

#define OV_THREAD OV_THREAD_TBB

#include <cstring>
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/core/parallel.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/op.hpp>

extern "C" {
#include "_int8.h"
}

namespace mapreuse {

constexpr int64_t MAX_INT8_KEYS = 1 << 16;  // sums of more products may overflow
constexpr int64_t MIN_ROWS = 12, MAX_ROWS = 48;

template <class Arguments>
void call(int64_t (*kernel)(const Arguments*, float*), const Arguments& arguments) {
    thread_local std::vector<float> memory;
    size_t needed = kernel(&arguments, nullptr);
    if (memory.size() < needed + 16)
        memory.resize(needed + 16);
    size_t place = reinterpret_cast<size_t>(memory.data());
    kernel(&arguments, reinterpret_cast<float*>((place + 63) / 64 * 64));
}

// One item of a tensor of shape (batch, positions, heads, dim); a batch of one serves all items.
matrices item_of(const ov::Tensor& tensor, int64_t item) {
    const auto& shape = tensor.get_shape();
    int64_t positions = shape[1], heads = shape[2], dim = shape[3];
    char* data = static_cast<char*>(const_cast<void*>(tensor.data()));
    int64_t start = shape[0] > 1 ? item * positions * heads * dim : 0;
    return {data + start * tensor.get_element_type().size(), dim, heads * dim};
}

// One item of a mask or bias, of shape (batch, heads, queries, keys); sizes of one serve all.
matrices broadcast_item_of(const ov::Tensor& tensor, int64_t item) {
    const auto& shape = tensor.get_shape();
    int64_t heads = shape[1], rows = shape[2], keys = shape[3];
    char* data = static_cast<char*>(const_cast<void*>(tensor.data()));
    int64_t start = shape[0] > 1 ? item * heads * rows * keys : 0;
    return {data + start * tensor.get_element_type().size(), heads > 1 ? rows * keys : 0, rows > 1 ? keys : 0};
}

map map_of(const ov::Tensor& weights, const ov::Tensor* scales, int64_t item) {
    const auto& shape = weights.get_shape();
    int64_t heads = shape[1], rows = shape[2], keys = shape[3], type = scales ? 2 : 0;
    char* data = static_cast<char*>(const_cast<void*>(weights.data()));
    float* item_scales = scales ? static_cast<float*>(const_cast<void*>(scales->data())) + item * heads * rows : nullptr;
    return {data + item * heads * rows * keys * (scales ? 1 : 4), rows * keys, keys, type, item_scales, rows, 1};
}

// Numbers of queries and keys up to the last ones that the mask uses, and whether it uses all pairs of these.
void valid_lengths(const matrices& mask, int64_t heads, int64_t& rows, int64_t& keys, bool& all) {
    int64_t last_row = 0, last_key = 0;
    for (int64_t head = 0; head < (mask.head ? heads : 1); head++)
        for (int64_t row = 0; row < (mask.row ? rows : 1); row++) {
            const char* allowed = static_cast<const char*>(mask.data) + head * mask.head + row * mask.row;
            int64_t key = keys;
            while (key > 0 && !allowed[key - 1])
                key--;
            last_key = std::max(last_key, key);
            if (key > 0)
                last_row = std::max(last_row, mask.row ? row + 1 : rows);
        }
    rows = last_row;
    keys = last_key;
    all = true;
    for (int64_t head = 0; head < (mask.head ? heads : 1); head++)
        for (int64_t row = 0; row < (mask.row ? rows : 1) && all; row++)
            all = !std::memchr(static_cast<const char*>(mask.data) + head * mask.head + row * mask.row, 0, keys);
}

int64_t rows_at_a_time(int64_t rows, int64_t heads, int64_t threads) {
    int64_t shared = (rows * heads + 4 * threads - 1) / (4 * threads);
    return std::min(rows, std::max(MIN_ROWS, std::min(MAX_ROWS, shared) / 6 * 6));
}

// context, and the map if `keeps`, and its scales if it has 8 bits.
class Attention : public ov::op::Op {
public:
    OPENVINO_OP("Attention", "mapreuse");
    Attention() = default;
    Attention(const ov::OutputVector& inputs, const std::string& parts, double scaling, bool causal, bool keeps,
              bool int8)
        : Op(inputs), m_parts(parts), m_scaling(scaling), m_causal(causal), m_keeps(keeps), m_int8(int8) {
        constructor_validate_and_infer_types();
    }
    void validate_and_infer_types() override {
        const auto &query = get_input_partial_shape(0), &values = get_input_partial_shape(2);
        set_output_size(!m_keeps ? 1 : m_int8 ? 3 : 2);
        set_output_type(0, ov::element::f32, {query[0], query[1], query[2], values[3]});
        if (!m_keeps)
            return;
        ov::Dimension keys = values[1];
        if (m_int8)
            keys = keys.is_static() ? ov::Dimension((keys.get_length() + 63) / 64 * 64) : ov::Dimension::dynamic();
        set_output_type(1, m_int8 ? ov::element::u8 : ov::element::f32, {query[0], query[2], query[1], keys});
        if (m_int8)
            set_output_type(2, ov::element::f32, {query[0], query[2], query[1], 1});
    }
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<Attention>(inputs, m_parts, m_scaling, m_causal, m_keeps, m_int8);
    }
    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("parts", m_parts);
        visitor.on_attribute("scaling", m_scaling);
        visitor.on_attribute("causal", m_causal);
        visitor.on_attribute("keeps", m_keeps);
        visitor.on_attribute("int8", m_int8);
        return true;
    }
    bool has_evaluate() const override { return true; }
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const auto &query = inputs[0].get_shape(), &values = inputs[2].get_shape();
        int64_t batch = query[0], num_queries = query[1], heads = query[2], num_keys = values[1];
        int64_t width = m_int8 ? (num_keys + 63) / 64 * 64 : num_keys;
        outputs[0].set_shape({query[0], query[1], query[2], values[3]});
        if (m_keeps)
            outputs[1].set_shape({query[0], query[2], query[1], size_t(width)});
        if (m_keeps && m_int8)
            outputs[2].set_shape({query[0], query[2], query[1], 1});
        size_t next = 3;
        const ov::Tensor* parts[4];  // relative queries and keys, mask, bias
        for (int part = 0; part < 4; part++)
            parts[part] = m_parts[part] == '1' ? &inputs[next++] : nullptr;
        bool int8 = m_int8 && mapreuse_has_int8_products() && num_keys <= MAX_INT8_KEYS;
        for (int64_t item = 0; item < batch; item++) {
            int64_t rows = num_queries, keys = num_keys;
            bool all = true;
            compute_arguments layer = {};
            if (parts[2]) {
                layer.allowed = broadcast_item_of(*parts[2], item);
                valid_lengths(layer.allowed, heads, rows, keys, all);
            }
            if (all)
                layer.allowed = {};
            layer.query = item_of(inputs[0], item);
            layer.key = item_of(inputs[1], item);
            layer.values = item_of(inputs[2], item);
            if (parts[0]) {
                layer.relative_query = item_of(*parts[0], item);
                layer.relative_key = item_of(*parts[1], item);
            }
            if (parts[3])
                layer.bias = broadcast_item_of(*parts[3], item);
            layer.context = item_of(outputs[0], item);
            if (m_keeps)
                layer.weights = map_of(outputs[1], m_int8 ? &outputs[2] : nullptr, item);
            clear_padding(layer, heads, rows, num_queries, width, values[3]);
            if (rows == 0)
                continue;
            layer.heads = heads;
            layer.rows = rows;
            layer.keys = keys;
            layer.dim = query[3];
            layer.value_dim = values[3];
            layer.scaling = static_cast<float>(m_scaling);
            layer.is_causal = m_causal;
            layer.num_keys = num_keys;
            layer.width = width;
            layer.threads = parallel_get_max_threads();
            layer.rows_at_a_time = rows_at_a_time(rows, heads, layer.threads);
            layer.max_isa = 2;
            call(int8 ? mapreuse_compute_int8 : mapreuse_compute, layer);
        }
        return true;
    }

private:
    // Rows of padding are zero in the context and in the map.
    void clear_padding(const compute_arguments& layer, int64_t heads, int64_t rows, int64_t num_queries, int64_t width,
                       int64_t value_dim) const {
        std::memset(static_cast<float*>(layer.context.data) + rows * heads * value_dim, 0,
                    (num_queries - rows) * heads * value_dim * sizeof(float));
        for (int64_t head = 0; head < heads && m_keeps; head++) {
            const map& to = layer.weights;
            size_t number = m_int8 ? 1 : sizeof(float);
            std::memset(static_cast<char*>(to.data) + (head * to.head + rows * to.row) * number, 0,
                        (num_queries - rows) * width * number);
            if (to.scales)
                std::memset(to.scales + head * num_queries + rows, 0, (num_queries - rows) * sizeof(float));
        }
    }

    std::string m_parts;  // '1' or '0' for relative queries, relative keys, mask and bias
    double m_scaling = 1;
    bool m_causal = false, m_keeps = false, m_int8 = false;
};

// context[h] = map[map_heads[h]] @ values[value_heads[h]]
class Apply : public ov::op::Op {
public:
    OPENVINO_OP("Apply", "mapreuse");
    Apply() = default;
    Apply(const ov::OutputVector& inputs, const std::vector<int64_t>& map_heads,
          const std::vector<int64_t>& value_heads)
        : Op(inputs), m_map_heads(map_heads), m_value_heads(value_heads) {
        constructor_validate_and_infer_types();
    }
    void validate_and_infer_types() override {
        const auto &weights = get_input_partial_shape(0), &values = get_input_partial_shape(get_input_size() - 1);
        int64_t heads = m_map_heads.size();
        set_output_type(0, ov::element::f32, {values[0], weights[2], heads, values[3]});
    }
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<Apply>(inputs, m_map_heads, m_value_heads);
    }
    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("map_heads", m_map_heads);
        visitor.on_attribute("value_heads", m_value_heads);
        return true;
    }
    bool has_evaluate() const override { return true; }
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const ov::Tensor& values = inputs.back();
        const ov::Tensor* scales = inputs.size() == 3 ? &inputs[1] : nullptr;
        const auto &weights = inputs[0].get_shape(), &shape = values.get_shape();
        outputs[0].set_shape({shape[0], weights[2], m_map_heads.size(), shape[3]});
        int64_t keys = shape[1];
        bool int8 = scales && mapreuse_has_int8_products() && keys <= MAX_INT8_KEYS;
        for (size_t item = 0; item < shape[0]; item++) {
            apply_arguments layer = {};
            layer.map_heads = weights[1];
            layer.rows = weights[2];
            layer.keys = keys;
            layer.value_dim = shape[3];
            layer.weights = map_of(inputs[0], scales, item);
            layer.values = item_of(values, item);
            layer.contexts = m_map_heads.size();
            layer.map_of = m_map_heads.data();
            layer.values_of = m_value_heads.data();
            layer.context = item_of(outputs[0], item);
            layer.threads = parallel_get_max_threads();
            layer.max_isa = 2;
            call(int8 ? mapreuse_apply_int8 : mapreuse_apply, layer);
        }
        return true;
    }

private:
    std::vector<int64_t> m_map_heads, m_value_heads;
};

using Context = ov::frontend::NodeContext;

ov::OutputVector inputs_of(const Context& node) {
    ov::OutputVector inputs;
    for (size_t index = 0; index < node.get_input_size(); index++)
        inputs.push_back(node.get_input(static_cast<int>(index)));
    return inputs;
}

ov::OutputVector attention(const Context& node) {
    auto flag = [&](const char* name) { return node.get_attribute<int64_t>(name) != 0; };
    return std::make_shared<Attention>(inputs_of(node), node.get_attribute<std::string>("parts"),
                                       node.get_attribute<float>("scaling"), flag("causal"), flag("keeps"),
                                       flag("int8"))
        ->outputs();
}

ov::OutputVector apply(const Context& node) {
    return std::make_shared<Apply>(inputs_of(node), node.get_attribute<std::vector<int64_t>>("map_heads"),
                                   node.get_attribute<std::vector<int64_t>>("value_heads"))
        ->outputs();
}

std::vector<ov::Extension::Ptr> extensions() {
    return {std::make_shared<ov::OpExtension<Attention>>(), std::make_shared<ov::OpExtension<Apply>>(),
            std::make_shared<ov::frontend::onnx::ConversionExtension>("Attention", "mapreuse", attention),
            std::make_shared<ov::frontend::onnx::ConversionExtension>("Apply", "mapreuse", apply)};
}

}  // namespace mapreuse

OPENVINO_CREATE_EXTENSIONS(mapreuse::extensions())
